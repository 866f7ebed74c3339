"""theory3: the parts of the bias shift. `python paper_figs/theory3.py [RUNS...]`

RUNS are folders of `biasshift demo` or of any experiment that records bias shifts.
"""

import sys

from biasshift import figures, plots
from biasshift.figures.theory import PARTS, shares

table = figures.data("theory3", *sys.argv[1:])  # sums of |own|, |incoming|, |second order|: one row per run, step and layer
whole = shares(table, []).groupby("activation")[list(PARTS)].mean().reset_index()

with plots.style():
    figure, (bars, along, layers) = plots.panels(3, width=2.9)
    plots.stacked(bars, whole, PARTS)
    plots.curves(along, shares(table, ["step", "epoch"]).assign(layer=""), "incoming", against="epoch", line="-")
    plots.layer_lines(layers, shares(table, ["number"]), "incoming")
    for ax in (along, layers):
        ax.set(ylim=(0, 1), ylabel="inherited share")
    plots.lettered([bars, along, layers], ["whole run", "along training", "by layer"])
    plots.one_legend(figure, [bars, along])
    plots.headed(figure, f"Sums of absolute parts over units, mean ± SD over seeds\n{figures.described(table)}")

for path in figures.write("theory3", figure, words=figures.caption("theory3", table)):
    print(path)
print(figures.said("theory3", table))
