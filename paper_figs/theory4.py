"""theory4: is it causal? Updates that take the bias shift out. `python paper_figs/theory4.py
[RUNS...]`

RUNS are folders of `biasshift sweep`.
"""

import sys

from biasshift import figures

# Its table holds training losses: one row per run and score,
# and its panels are in biasshift/figures/sweep.py.
figure = figures.script("theory4", *sys.argv[1:])
