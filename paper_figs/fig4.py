"""Figure 4: CIFAR-100, 11 layers: training loss and test error. `python paper_figs/fig4.py [RUNS...]`

RUNS are folders of `biasshift train cifar11`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("4", *sys.argv[1:])  # training loss and test error: one row per run and score
    figure = figures.picture("4", table)  # panel by panel in biasshift/figures/pictures.py
    for path in figures.write("4", figure, words=figures.caption("4", table)):
        print(path)
    print(figures.said("4", table))
