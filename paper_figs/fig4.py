"""Figure 4: CIFAR-100, 11 layers: training loss and test error. `python paper_figs/fig4.py [RUNS...]`

RUNS are folders of `biasshift train cifar11`.
"""

import sys

from biasshift import figures, plots

table = figures.data("4", *sys.argv[1:])  # training loss and test error: one row per run and score
split = table["step"].max() * 90 / 165  # of the paper's 165,000 updates
parts = {"whole": table, "start": table[table["step"] <= split], "end": table[table["step"] >= split]}

with plots.style():
    figure, axes = plots.panels(6, rows=2, width=2.9, height=2.4)
    for row, column in enumerate(("train_loss", "test_error")):
        for ax, part in zip(axes[3 * row :], parts.values(), strict=False):
            plots.curves(ax, part, column)
            plots.in_thousands(ax)
            ax.set_ylabel(("training loss (nats)", "test error (%)")[row])
            if row:
                plots.in_percent(ax.yaxis)
    plots.lettered(axes, [f"{name}, {part}" for name in ("training loss", "test error") for part in parts])
    plots.one_legend(figure, axes)
    plots.headed(figure, f"Mean ± SD over seeds\n{figures.described(table)}")

for path in figures.write("4", figure, words=figures.caption("4", table)):
    print(path)
print(figures.said("4", table))
