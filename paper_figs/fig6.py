"""Figure 6: ImageNet: training loss, top-5 and top-1 error. `python paper_figs/fig6.py [RUNS...]`

RUNS are folders of `biasshift train imagenet`.
"""

import sys

from biasshift import figures

# Its table holds losses and errors: one row per run and score,
# and its panels are in biasshift/figures/convnets.py.
figure = figures.script("6", *sys.argv[1:])
