"""Figure 3: reconstruction error of autoencoders, four learning rates. `python paper_figs/fig3.py [RUNS...]`

RUNS are folders of `biasshift train autoencoder`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("3", *sys.argv[1:])  # training and test errors: one row per run and epoch
    figure = figures.picture("3", table)  # panel by panel in biasshift/figures/connected.py
    for path in figures.write("3", figure, words=figures.caption("3", table)):
        print(path)
    print(figures.said("3", table))
