"""theory2: Theorem 2 along training: k and the corrected means.

    python paper_figs/theory2.py [RUNS...]

RUNS are folders of `biasshift demo` or `biasshift train mnist`. Without any, the package's table is
drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/theory.py;
# the table holds medians over units, one row per run and measurement.
figure = figures.script("theory2", *sys.argv[1:])
