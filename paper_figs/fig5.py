"""Figure 5: CIFAR-100 with and without batch normalization. `python paper_figs/fig5.py [RUNS...]`

RUNS are folders of `biasshift train cifar11`, with and without `--batch-norm`.
"""

import sys

from biasshift import figures

# Its table holds test errors: one row per run and score,
# and its panels are in biasshift/figures/convnets.py.
figure = figures.script("5", *sys.argv[1:])
