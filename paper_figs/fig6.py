"""Figure 6: ImageNet: training loss, top-5 and top-1 error. `python paper_figs/fig6.py [RUNS...]`

RUNS are folders of `biasshift train imagenet`.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("6", *sys.argv[1:])  # losses and errors: one row per run and score
    figure = figures.picture("6", table)  # panel by panel in biasshift/figures/pictures.py
    for path in figures.write("6", figure, words=figures.caption("6", table)):
        print(path)
    print(figures.said("6", table))
