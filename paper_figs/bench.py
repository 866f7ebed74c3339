"""bench: time and memory of unit Fisher matrices.

    python paper_figs/bench.py [RESULTS...]

RESULTS are files or folders that `python -m benchmarks` wrote. Without any, the package's table is
drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/benchmarks.py;
# the table holds one row per question and method.
figure = figures.script("bench", *sys.argv[1:])
