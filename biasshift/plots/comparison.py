"""Numbers beside numbers: the gradient gap, spans at named places, rankings, parts of a whole.

Marks are filled for numbers of the given runs, and hollow for numbers that the paper published or
that rest on too few samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from biasshift.analysis.quantities import ENOUGH_UNITS
from biasshift.plots.reductions import gap_points, need
from biasshift.plots.theme import PAPER, Look, between, escaped, legend, looks

COLOR = "#004488"
UNSEEN = 0.005  # of the whole: a share that is no more than the edge of its bar
SPREAD = 0.6  # of the distance between two places, for the groups at one of them
LARGEST, SMALLEST, GROWING, IN_LEGEND = 240, 45, 3.5, 60  # areas of markers


def gap_against_mean(
    ax: Axes,
    table: pd.DataFrame,
    layers: Sequence[str] | None = None,
    skip_input: bool = False,
    group: str = "activation",
) -> Axes:
    """Returns `ax` with the gradient gap against the mean incoming activation.

    There is a dot per run, layer and step, and a large marker at the medians of each group. Large
    markers are smaller than those below them: of two at one place, both are seen. A column
    `enough` of the table is the share of a layer's units with enough effective samples. Dots below
    one half are hollow and take no part in the medians.

    Args:
        layers, skip_input: as in `gap_points`.
        group: the column that marker and color stand for.

    Raises:
        ValueError: the table is empty or lacks a column, or nothing is left of it.
    """
    need(table, [group], "the gradient gap")
    points = gap_points(table, layers, skip_input)
    by_name = looks(points[group].unique(), group)
    for above, (name, look) in zip(range(len(by_name))[::-1], by_name.items(), strict=True):
        dots = points.loc[points[group] == name]
        enough = ~(dots["enough"] < ENOUGH_UNITS) if "enough" in dots else dots["degrees"].notna()
        sure, unsure = dots.loc[enough], dots.loc[~enough]
        small: Any = {"s": 9, "marker": look.marker, "rasterized": True}
        big: Any = {
            "color": look.color,
            "marker": look.marker,
            "edgecolors": "white",
            "linewidths": 1.2,
            "zorder": 3,
        }
        ax.scatter(
            sure["mean_in_abs"], sure["degrees"], alpha=0.3, color=look.color, linewidths=0, **small
        )
        if len(unsure):
            ax.scatter(
                unsure["mean_in_abs"],
                unsure["degrees"],
                alpha=0.7,
                edgecolors=look.color,
                facecolors="none",
                linewidths=0.8,
                **small,
            )
        ax.scatter(
            [sure["mean_in_abs"].median()],
            [sure["degrees"].median()],
            s=min(LARGEST, SMALLEST * GROWING**above),
            **big,
        )
        runs = sure["run"].nunique() if "run" in dots else 1
        ax.scatter([], [], s=IN_LEGEND, label=f"{escaped(look.label)} (n = {runs})", **big)
    ax.set(
        xlabel="incoming activations: mean over inputs of $|E_p(a)|$",
        ylabel="angle between gradient and\nunit natural gradient (degrees)",
    )
    return legend(ax)


def spans(
    ax: Axes,
    table: pd.DataFrame,
    at: str,
    group: str = "activation",
    middle: str = "mean",
    low: str = "low",
    high: str = "high",
) -> Axes:
    """Returns `ax` with a mark and a bar from `low` to `high` for every group, side by side.

    Args:
        table: one row per place and group. A column `n` goes into the legend.
        at: the column that names the places, which stand in order of appearance.
        middle, low, high: the columns of the mark and of the two ends of the bar.

    Raises:
        ValueError: the table is empty or lacks a column.
    """
    need(table, [at, group, middle, low, high], "spans")
    places = {place: number for number, place in enumerate(table[at].drop_duplicates())}
    by_name = looks(table[group].unique(), group)
    for number, (name, look) in enumerate(by_name.items()):
        rows = table.loc[table[group] == name]
        offset = SPREAD * ((number + 0.5) / len(by_name) - 0.5)
        runs = f" (n = {between(rows['n'].astype(int))})" if "n" in rows else ""
        ax.errorbar(
            [places[place] + offset for place in rows[at]],
            rows[middle],
            [rows[middle] - rows[low], rows[high] - rows[middle]],
            fmt=look.marker,
            color=look.color,
            capsize=2,
            linewidth=1,
            label=escaped(look.label) + runs,
        )
    ax.set_xticks(
        list(places.values()),
        [str(place).replace("-", "-\n") for place in places],
        parse_math=False,
    )
    ax.set_xlim(-0.6, len(places) - 0.4)
    return legend(ax)


def ranking(
    ax: Axes,
    ours: Mapping[str, float],
    paper: Mapping[str, float] | None = None,
    marks: Mapping[str, Look] | None = None,
) -> Axes:
    """Returns `ax` with one row per name, the first on top.

    Dots are filled for numbers of these runs, and hollow for the paper's, which come first.

    Args:
        ours, paper: a number by the name of its row.
        marks: the looks of rows that have one of their own.
    """
    paper, marks = paper or {}, marks or {}
    names = list(dict.fromkeys([*paper, *ours]))
    height = {name: len(names) - number for number, name in enumerate(names)}
    if paper:
        ax.plot(list(paper.values()), [height[name] for name in paper], **PAPER, label="paper")
    if alike := [name for name in ours if name not in marks]:
        x, y = [ours[name] for name in alike], [height[name] for name in alike]
        ax.plot(x, y, "D", color=COLOR, markersize=5, label="these runs")
    for name, look in marks.items():
        ax.plot([ours[name]], [height[name]], look.marker, color=look.color, markersize=6)
    ax.set_yticks(list(height.values()), names, parse_math=False)
    ax.set_ylim(0.4, len(names) + 0.6)
    ax.grid(axis="x", color="0.9")
    return ax


def published(ax: Axes, points: Sequence[tuple[float, float, str]], label: str = "paper") -> Axes:
    """Returns `ax` with published numbers as hollow marks.

    The shape and the color of a mark are those of its activation. All of them share one grey entry
    in the legend.

    Args:
        points: x, y and activation of each number.
    """
    for x, y, activation in points:
        look = looks([activation])[activation]
        ax.plot([x], [y], **(PAPER | {"marker": look.marker, "markeredgecolor": look.color}))
    if points:
        ax.plot([], [], **PAPER, label=label)
    return ax


def stacked(
    ax: Axes, table: pd.DataFrame, columns: Mapping[str, str], group: str = "activation"
) -> Axes:
    """Returns `ax` with a bar per group, of shares that add up to 1.

    If a share is too small for the eye, the legend says how large it is at most.

    Args:
        table: one row per group.
        columns: the columns of at most three shares, from below, and what each is called.

    Raises:
        ValueError: the table is empty or lacks a column.
    """
    need(table, [group, *columns], "shares")
    bars = looks(table[group].unique(), group)
    rows = table.set_index(group).loc[list(bars)]
    below = rows[next(iter(columns))].to_numpy(float) * 0
    for (column, name), grey, hatch in zip(
        columns.items(), ("0.35", "0.65", "0.9"), ("", "///", ""), strict=False
    ):
        shares = rows[column].to_numpy(float)
        ax.bar(
            range(len(bars)),
            shares,
            bottom=below,
            width=0.65,
            color=grey,
            hatch=hatch,
            edgecolor="white",
            label=name + _at_most(shares.max()),
        )
        below = below + shares
    ax.set_xticks(range(len(bars)), [escaped(look.label) for look in bars.values()])
    ax.set_ylim(0, 1)
    return legend(ax)


def _at_most(share: float) -> str:
    """ " (< 0.1 %)" for a share that nobody sees; nothing for others."""
    if not 0 < share < UNSEEN:
        return ""
    return f" (< {100 * 10.0 ** math.ceil(math.log10(share) + 1e-9):.3g} %)"
