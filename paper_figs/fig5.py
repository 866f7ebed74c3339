"""Figure 5: CIFAR-100 with and without batch normalization. `python paper_figs/fig5.py [RUNS...]`

RUNS are folders of `biasshift train cifar11`, with and without `--batch-norm`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("5", *sys.argv[1:])  # test errors: one row per run and score
    figure = figures.picture("5", table)  # panel by panel in biasshift/figures/pictures.py
    for path in figures.write("5", figure, words=figures.caption("5", table)):
        print(path)
    print(figures.said("5", table))
