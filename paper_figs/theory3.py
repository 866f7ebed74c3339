"""theory3: the parts of the bias shift. `python paper_figs/theory3.py [RUNS...]`

RUNS are folders of `biasshift demo` or of any experiment that records bias shifts.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("theory3", *sys.argv[1:])  # sums of |own|, |incoming|, |second order|: one row per run, step and layer
    figure = figures.picture("theory3", table)  # panel by panel in biasshift/figures/theory.py
    for path in figures.write("theory3", figure, words=figures.caption("theory3", table)):
        print(path)
    print(figures.said("theory3", table))
