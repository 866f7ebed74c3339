"""Figure 7: variance over epochs of the activation of every hidden unit. `python paper_figs/fig7.py [RUNS...]`

RUNS are folders of `biasshift train mnist --depth 5 --width 256 --epochs 200 --activation elu relu`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("7", *sys.argv[1:])  # variances: one row per run, layer and unit
    figure = figures.picture("7", table)  # panel by panel in biasshift/figures/connected.py
    for path in figures.write("7", figure, words=figures.caption("7", table)):
        print(path)
    print(figures.said("7", table))
