"""Table 1: test errors on CIFAR-10 and CIFAR-100, beside the paper's networks.

    python paper_figs/table1.py [RUNS...]

RUNS are folders of `biasshift train cifar18`. Without any, the package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/convnets.py;
# the table holds the last test error of every run.
figure = figures.script("table1", *sys.argv[1:])
