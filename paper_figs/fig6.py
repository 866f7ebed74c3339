"""Figure 6: ImageNet: training loss, top-5 and top-1 error. `python paper_figs/fig6.py [RUNS...]`

RUNS are folders of `biasshift train imagenet`.
"""

import sys

from biasshift import figures, plots

table = figures.data("6", *sys.argv[1:])  # losses and errors: one row per run and score
columns = {"train_loss": "training loss (nats)", "valid_error5": "top-5 error (%)", "valid_error": "top-1 error (%)"}

with plots.style():
    figure, axes = plots.panels(3, width=2.9, height=2.9)
    for ax, (column, label) in zip(axes, columns.items(), strict=True):
        plots.curves(ax, table, column)
        plots.in_thousands(ax)
        ax.set_ylabel(label)
        if "error" in column:
            plots.in_percent(ax.yaxis)
    plots.lettered(axes, ["training loss", "top-5 error", "top-1 error"])
    plots.one_legend(figure, axes)
    plots.headed(figure, figures.described(table))

for path in figures.write("6", figure, words=figures.caption("6", table)):
    print(path)
print(figures.said("6", table))
