"""Figure 2: mean unit activations and learning curves on MNIST.

    python paper_figs/fig2.py [RUNS...]

RUNS are folders of `biasshift train mnist` or `biasshift demo`. Without any, the package's table is
drawn.
"""

import sys

from biasshift import figures, plots
from biasshift.figures.captions import over_seeds

with figures.in_a_sentence(), plots.style():
    # Median unit activations and losses: one row per run and step.
    table = figures.data("2", *sys.argv[1:])
    figure, (means, losses) = plots.panels(2)
    plots.unit_means(means, table, line="-")
    plots.learning_curves(losses, table, log=True)
    plots.no_legend(means)  # the same colors and markers as beside it
    texts = ("mean ± SD over seeds", "mean ± SD of the logarithm")
    plots.lettered([means, losses], [over_seeds(table, text) for text in texts])
    plots.headed(figure, figures.described(table))
    for path in figures.write("2", figure, words=figures.caption("2", table)):
        print(path)
    print(figures.said("2", table))
