"""theory3: the parts of the bias shift.

    python paper_figs/theory3.py [RUNS...]

RUNS are folders of `biasshift demo` or of any experiment that records bias shifts. Without any, the
package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/theory.py;
# the table holds sums of |own|, |incoming|, |second order|, one row per run, step and layer.
figure = figures.script("theory3", *sys.argv[1:])
