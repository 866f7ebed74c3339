"""bench: time and memory of unit Fisher matrices. `python paper_figs/bench.py [RESULTS...]`

RESULTS are files or folders that `python -m benchmarks` wrote.
"""

import sys

from biasshift import figures

with figures.in_a_sentence():
    table = figures.data("bench", *sys.argv[1:])  # one row per question and method
    figure = figures.picture("bench", table)  # panel by panel in biasshift/figures/speed.py
    for path in figures.write("bench", figure, words=figures.caption("bench", table)):
        print(path)
    print(figures.said("bench", table))
