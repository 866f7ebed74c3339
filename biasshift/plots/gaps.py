"""The gradient gap against what is said to cause it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from biasshift.plots.reducing import gap_points, need
from biasshift.plots.styling import legend, looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def gap_against_mean(
    ax: Axes, table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False, group: str = "activation"
) -> Axes:
    """Returns `ax` with the gradient gap against the mean incoming activation, a dot per run, layer and step.

    The larger marker of each group is at its medians. `layers` and `skip_input` as in `gap_points`.
    """
    need(table, [group], "the gradient gap")
    points = gap_points(table, layers, skip_input)
    for name, look in looks(points[group].unique(), group).items():
        dots = points.loc[points[group] == name]
        x, y = dots["mean_in_abs"], dots["degrees"]
        ax.scatter(x, y, s=9, alpha=0.3, color=look.color, marker=look.marker, linewidths=0, rasterized=True)
        runs = dots["run"].nunique() if "run" in dots else 1
        big = {"s": 80, "color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 1.2, "zorder": 3}
        ax.scatter([x.median()], [y.median()], label=f"{look.label} (n = {runs})", **big)
    ax.set(xlabel="incoming activations: mean over inputs of $|E_p(a)|$")
    ax.set(ylabel="angle between gradient and\nunit natural gradient (degrees)")
    legend(ax)
    return ax
