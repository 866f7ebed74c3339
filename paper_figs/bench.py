"""bench: time and memory of unit Fisher matrices. `python paper_figs/bench.py [RESULTS...]`

RESULTS are files or folders that `python -m benchmarks` wrote.
"""

import sys

from biasshift import figures

# Its table holds one row per question and method,
# and its panels are in biasshift/figures/benchmarks.py.
figure = figures.script("bench", *sys.argv[1:])
