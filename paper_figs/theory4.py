"""theory4: is it causal? Updates that take the bias shift out. `python paper_figs/theory4.py [RUNS...]`

RUNS are folders of `biasshift sweep`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("theory4", *sys.argv[1:])  # training losses: one row per run and score
    figure = figures.picture("theory4", table)  # panel by panel in biasshift/figures/causal.py
    for path in figures.write("theory4", figure, words=figures.caption("theory4", table)):
        print(path)
    print(figures.said("theory4", table))
