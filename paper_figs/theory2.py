"""theory2: Theorem 2 along training: k and the corrected means. `python paper_figs/theory2.py
[RUNS...]`

RUNS are folders of `biasshift demo` or `biasshift train mnist`.
"""

import sys

from biasshift import figures

# Its table holds medians over units: one row per run and measurement,
# and its panels are in biasshift/figures/theory.py.
figure = figures.script("theory2", *sys.argv[1:])
