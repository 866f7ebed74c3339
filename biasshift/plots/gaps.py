"""The gradient gap against what is said to cause it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biasshift.analysis.per_run import ENOUGH_UNITS
from biasshift.plots.reductions import gap_points, need
from biasshift.plots.theme import escaped, legend, looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LARGEST, SMALLEST, GROWING, IN_LEGEND = 240, 45, 3.5, 60  # areas of markers


def gap_against_mean(
    ax: Axes, table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False, group: str = "activation"
) -> Axes:
    """Returns `ax` with the gradient gap against the mean incoming activation, a dot per run, layer and step.

    The large marker of each group is at its medians, smaller than the ones below it: of two at one place, both are seen. `layers` and
    `skip_input` as in `gap_points`. Where the table has a column `enough`, the share of a layer's units with enough effective
    samples, dots below one half are hollow and take no part in the medians.
    """
    need(table, [group], "the gradient gap")
    points = gap_points(table, layers, skip_input)
    found = looks(points[group].unique(), group)
    for above, (name, look) in zip(range(len(found))[::-1], found.items(), strict=True):
        dots = points.loc[points[group] == name]
        enough = ~(dots["enough"] < ENOUGH_UNITS) if "enough" in dots else dots["degrees"].notna()
        sure, unsure = dots.loc[enough], dots.loc[~enough]
        small, hollow = {"s": 9, "marker": look.marker, "rasterized": True}, {"facecolors": "none", "linewidths": 0.8}
        ax.scatter(sure["mean_in_abs"], sure["degrees"], alpha=0.3, color=look.color, linewidths=0, **small)
        if len(unsure):
            ax.scatter(unsure["mean_in_abs"], unsure["degrees"], alpha=0.7, edgecolors=look.color, **hollow, **small)
        runs = sure["run"].nunique() if "run" in dots else 1
        big: Any = {"color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 1.2, "zorder": 3}
        ax.scatter([sure["mean_in_abs"].median()], [sure["degrees"].median()], s=min(LARGEST, SMALLEST * GROWING**above), **big)
        ax.scatter([], [], s=IN_LEGEND, label=f"{escaped(look.label)} (n = {runs})", **big)
    ax.set(xlabel="incoming activations: mean over inputs of $|E_p(a)|$")
    ax.set(ylabel="angle between gradient and\nunit natural gradient (degrees)")
    legend(ax)
    return ax
