"""Figure 4: CIFAR-100, 11 layers: training loss and test error. `python paper_figs/fig4.py
[RUNS...]`

RUNS are folders of `biasshift train cifar11`.
"""

import sys

from biasshift import figures

# Its table holds training loss and test error: one row per run and score,
# and its panels are in biasshift/figures/convnets.py.
figure = figures.script("4", *sys.argv[1:])
