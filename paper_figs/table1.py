"""Table 1: test errors on CIFAR-10 and CIFAR-100, beside the paper's ten networks. `python
paper_figs/table1.py [RUNS...]`

RUNS are folders of `biasshift train cifar18`.
"""

import sys

from biasshift import figures

# Its table holds the last test error of every run,
# and its panels are in biasshift/figures/listing.py.
figure = figures.script("table1", *sys.argv[1:])
