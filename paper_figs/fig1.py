"""Figure 1: the activation functions. `python paper_figs/fig1.py`"""

from biasshift import figures, plots

with plots.style():
    figure, (ax,) = plots.panels(1)
    plots.activation_functions(ax, ("elu", "lrelu", "relu", "srelu"))

for path in figures.write("1", figure):
    print(path)
