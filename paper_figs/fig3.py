"""Figure 3: reconstruction error of autoencoders, four learning rates. `python paper_figs/fig3.py [RUNS...]`

RUNS are folders of `biasshift train autoencoder`.
"""

import sys

from biasshift import figures, plots

table = figures.data("3", *sys.argv[1:])  # training and test errors: one row per run and epoch
rates = sorted(table["lr"].unique(), reverse=True)

with plots.style():
    figure, axes = plots.panels(2 * len(rates), rows=2, width=2.3, height=2.4, share_y="row")
    for row, column in enumerate(("train_error", "test_error")):
        for ax, rate in zip(axes[row * len(rates) :], rates, strict=False):
            plots.curves(ax, table[table["lr"] == rate], column, against="epoch", log=True, middle="median")
            ax.set(title=f"learning rate {rate:g}", ylabel=f"{column.split('_')[0]} error")
    plots.one_legend(figure, axes)
    plots.headed(figure, f"Squared error per pixel, medians over runs\n{figures.described(table)}")

for path in figures.write("3", figure, words=figures.caption("3", table)):
    print(path)
print(figures.said("3", table))
