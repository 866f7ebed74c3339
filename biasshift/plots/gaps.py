"""The gradient gap against what is said to cause it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from biasshift.plots.reducing import gap_points, need
from biasshift.plots.styling import legend, looks
from biasshift.summary import ENOUGH_UNITS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def gap_against_mean(
    ax: Axes, table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False, group: str = "activation"
) -> Axes:
    """Returns `ax` with the gradient gap against the mean incoming activation, a dot per run, layer and step.

    The larger marker of each group is at its medians. `layers` and `skip_input` as in `gap_points`. Where the table has a column
    `enough`, the share of a layer's units with enough effective samples, dots below one half are hollow and take no part in the medians.
    """
    need(table, [group], "the gradient gap")
    points = gap_points(table, layers, skip_input)
    for name, look in looks(points[group].unique(), group).items():
        dots = points.loc[points[group] == name]
        enough = ~(dots["enough"] < ENOUGH_UNITS) if "enough" in dots else dots["degrees"].notna()
        sure, unsure = dots.loc[enough], dots.loc[~enough]
        small, hollow = {"s": 9, "marker": look.marker, "rasterized": True}, {"facecolors": "none", "linewidths": 0.5}
        ax.scatter(sure["mean_in_abs"], sure["degrees"], alpha=0.3, color=look.color, linewidths=0, **small)
        if len(unsure):
            ax.scatter(unsure["mean_in_abs"], unsure["degrees"], alpha=0.2, edgecolors=look.color, **hollow, **small)
        runs = sure["run"].nunique() if "run" in dots else 1
        big = {"s": 80, "color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 1.2, "zorder": 3}
        ax.scatter([sure["mean_in_abs"].median()], [sure["degrees"].median()], label=f"{look.label} (n = {runs})", **big)
    ax.set(xlabel="incoming activations: mean over inputs of $|E_p(a)|$")
    ax.set(ylabel="angle between gradient and\nunit natural gradient (degrees)")
    legend(ax)
    return ax
