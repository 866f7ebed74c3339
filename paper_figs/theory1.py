"""theory1: the gradient gap against the mean incoming activation.

    python paper_figs/theory1.py [RUNS...]

RUNS are folders of `biasshift demo` or `biasshift train mnist`. Without any, the package's table is
drawn.
"""

import sys

from biasshift import figures, plots
from biasshift.figures.theory import gap_title

with figures.in_a_sentence(), plots.style():
    table = figures.data("theory1", *sys.argv[1:])  # one row per run, layer and measurement
    figure, (ax,) = plots.panels(1)
    plots.gap_against_mean(ax, table)
    ax.set_title(gap_title(table), loc="left")
    plots.headed(figure, figures.described(table))
    for path in figures.write("theory1", figure, words=figures.caption("theory1", table)):
        print(path)
    print(figures.said("theory1", table))
