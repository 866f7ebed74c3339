"""Figure 7: variance over epochs of the activation of every hidden unit.

    python paper_figs/fig7.py [RUNS...]

RUNS are folders of
`biasshift train mnist --depth 5 --width 256 --epochs 200 --activation elu relu`. Without any, the
package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/mlp.py;
# the table holds variances, one row per run, layer and unit.
figure = figures.script("7", *sys.argv[1:])
