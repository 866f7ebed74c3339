"""Figure 5: CIFAR-100 with and without batch normalization.

    python paper_figs/fig5.py [RUNS...]

RUNS are folders of `biasshift train cifar11`, with and without `--batch-norm`. Without any, the
package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/convnets.py;
# the table holds test errors, one row per run and score.
figure = figures.script("5", *sys.argv[1:])
