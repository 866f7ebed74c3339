"""Table 1: test errors on CIFAR-10 and CIFAR-100, beside the paper's ten networks. `python paper_figs/table1.py [RUNS...]`

RUNS are folders of `biasshift train cifar18`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("table1", *sys.argv[1:])  # the last test error of every run
    figure = figures.picture("table1", table)  # panel by panel in biasshift/figures/listing.py
    for path in figures.write("table1", figure, words=figures.caption("table1", table)):
        print(path)
    print(figures.said("table1", table))
