"""theory4: is it causal? Updates that take the bias shift out.

    python paper_figs/theory4.py [RUNS...]

RUNS are folders of `biasshift sweep`. Without any, the package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/sweep.py;
# the table holds training losses, one row per run and score.
figure = figures.script("theory4", *sys.argv[1:])
