"""Figure 3: reconstruction error of autoencoders, four learning rates. `python paper_figs/fig3.py
[RUNS...]`

RUNS are folders of `biasshift train autoencoder`.
"""

import sys

from biasshift import figures

# Its table holds training and test errors: one row per run and epoch,
# and its panels are in biasshift/figures/mlp.py.
figure = figures.script("3", *sys.argv[1:])
