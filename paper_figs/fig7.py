"""Figure 7: variance over epochs of the activation of every hidden unit. `python paper_figs/fig7.py
[RUNS...]`

RUNS are folders of `biasshift train mnist --depth 5 --width 256 --epochs 200 --activation elu
relu`.
"""

import sys

from biasshift import figures

# Its table holds variances: one row per run, layer and unit,
# and its panels are in biasshift/figures/mlp.py.
figure = figures.script("7", *sys.argv[1:])
