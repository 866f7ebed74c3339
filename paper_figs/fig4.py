"""Figure 4: CIFAR-100, 11 layers: training loss and test error.

    python paper_figs/fig4.py [RUNS...]

RUNS are folders of `biasshift train cifar11`. Without any, the package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/convnets.py;
# the table holds training loss and test error, one row per run and score.
figure = figures.script("4", *sys.argv[1:])
