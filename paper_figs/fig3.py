"""Figure 3: reconstruction error of autoencoders, at four learning rates.

    python paper_figs/fig3.py [RUNS...]

RUNS are folders of `biasshift train autoencoder`. Without any, the package's table is drawn.
"""

import sys

from biasshift import figures

# The panels are in biasshift/figures/mlp.py;
# the table holds training and test errors, one row per run and epoch.
figure = figures.script("3", *sys.argv[1:])
