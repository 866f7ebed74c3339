"""The pictures: `(ax, table) -> ax`. Each is a reduction of the tidy table, then lines or dots on the given axes.

styling     one style, panels, legends, the look of every line
reducing    pure functions from table to table: what a picture shows
functions   activation functions
curves      lines along training, with ribbons
gaps        the gradient gap against the mean incoming activation
comparing   numbers beside numbers
"""

from typing import TYPE_CHECKING

from biasshift.plots.comparison import published, ranking, spans, stacked
from biasshift.plots.functions import activation_functions
from biasshift.plots.gaps import gap_against_mean
from biasshift.plots.lines import coupling, curves, layer_lines, learning_curves, lines_and_ribbons, unit_means
from biasshift.plots.looks import LOOKS, OTHER_LOOKS, Look
from biasshift.plots.reductions import gap_points, mean_and_sd_over_seeds, median_over_runs, median_over_units, need, with_epochs
from biasshift.plots.theme import (
    STYLE,
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

__all__ = [
    "LOOKS", "OTHER_LOOKS", "STYLE", "Look", "activation_functions", "between", "coupling", "curves", "escaped", "gap_against_mean",
    "gap_points", "headed", "in_percent", "in_thousands", "layer_lines", "learning_curves", "legend", "lettered",
    "lines_and_ribbons", "looks", "mean_and_sd_over_seeds", "median_over_runs", "median_over_units", "need",
    "no_legend", "on_log_scale", "one_legend", "panels", "published", "ranking", "spans", "stacked", "style", "unit_means",
    "with_epochs",
]  # fmt: skip
