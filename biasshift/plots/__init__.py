"""The pictures: `(ax, table) -> ax`, lines or dots on the given axes of a reduced tidy table.

theme       one style, panels, legends, the look of every line
reductions  pure functions from table to table: what a picture shows
lines       activation functions, and lines along training, with ribbons
comparison  numbers beside numbers: the gradient gap, spans, rankings, parts of a whole
objects     one picture of whatever was measured: `biasshift.plot`
"""

from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure

from biasshift.plots.comparison import gap_against_mean, published, ranking, spans, stacked
from biasshift.plots.lines import (
    activation_functions,
    coupling,
    curves,
    layer_lines,
    learning_curves,
    lines_and_ribbons,
    unit_means,
)
from biasshift.plots.reductions import (
    gap_points,
    mean_and_sd_over_seeds,
    median_over_runs,
    median_over_units,
    need,
    with_epochs,
)
from biasshift.plots.theme import (
    LOOKS,
    OTHER_LOOKS,
    STYLE,
    Look,
    between,
    escaped,
    headed,
    in_percent,
    in_thousands,
    legend,
    lettered,
    looks,
    no_legend,
    on_log_scale,
    one_legend,
    panels,
    style,
)

__all__ = [
    "LOOKS",
    "OTHER_LOOKS",
    "STYLE",
    "Look",
    "activation_functions",
    "between",
    "coupling",
    "curves",
    "escaped",
    "gap_against_mean",
    "gap_points",
    "headed",
    "in_percent",
    "in_thousands",
    "layer_lines",
    "learning_curves",
    "legend",
    "lettered",
    "lines_and_ribbons",
    "looks",
    "mean_and_sd_over_seeds",
    "median_over_runs",
    "median_over_units",
    "need",
    "no_legend",
    "on_log_scale",
    "one_legend",
    "panels",
    "published",
    "ranking",
    "spans",
    "stacked",
    "style",
    "unit_means",
    "with_epochs",
]
