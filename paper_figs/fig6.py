"""Figure 6: ImageNet: training loss, top-5 and top-1 error.

    python paper_figs/fig6.py [RUNS...]

RUNS are folders of `biasshift train imagenet`. Without any, the package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/convnets.py;
# the table holds losses and errors, one row per run and score.
figure = figures.script("6", *sys.argv[1:])
