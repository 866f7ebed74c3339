"""theory2: Theorem 2 along training: k and the corrected means. `python paper_figs/theory2.py [RUNS...]`

RUNS are folders of `biasshift demo` or `biasshift train mnist`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("theory2", *sys.argv[1:])  # medians over units: one row per run and measurement
    figure = figures.picture("theory2", table)  # panel by panel in biasshift/figures/theory.py
    for path in figures.write("theory2", figure, words=figures.caption("theory2", table)):
        print(path)
    print(figures.said("theory2", table))
