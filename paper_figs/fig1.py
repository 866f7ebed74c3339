"""Figure 1: the activation functions.

python paper_figs/fig1.py
"""

import sys

from biasshift import figures, plots

with figures.in_a_sentence(), plots.style():
    figures.data("1", *sys.argv[1:])  # refuses folders: the figure shows functions
    figure, (ax,) = plots.panels(1)
    plots.activation_functions(ax, ("elu", "srelu", "lrelu", "relu"))
    for path in figures.write("1", figure, words=figures.caption("1", None)):
        print(path)
