"""The tidy table of all runs, reduced to the few thousand numbers that a page can hold.

Learning curves keep at most `MAX_POINTS` points and the heat map at most `MAX_CELLS` cells. Steps
and layers are evenly chosen, units become percentiles, and seeds become a mean and a standard
deviation. Whatever is lost on the way is written down in a sentence for the page.
"""

import re
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from biasshift.analysis.grid import RULE
from biasshift.report.groups import RunGroup
from biasshift.report.html import distinct, listed, plain
from biasshift.report.words import all_in_words, in_words

MAX_CELLS = 18_000  # (quantity, group, layer, step): about 140 bytes each
MAX_POINTS = 12_000  # of all learning curves
MAX_STEPS, MAX_LAYERS, MAX_QUANTITIES = 40, 32, 40
MAX_POINTS_PER_CURVE = 150
LARGEST = 1e150  # squares of larger numbers may overflow
# Percentiles in the charts: without the least and the largest of thousands of values, one of which
# could squeeze all others.
DRAWN = (5, 10, 25, 50, 75, 90, 95)
LEVELS = (0, *DRAWN, 100)  # percentiles of the values in a cell
ALL_LAYERS = -1  # the position of what is pooled over layers
# Positions of rows about the whole network, and of rows that are in no chart.
_NETWORK, _NOWHERE = -2, -3
_SPLIT = re.compile(r"(train|valid|test)_(.+)")
_KEYS = {"step", "layer", "unit", "run", "epoch", "inputs"}
_FENCE = 3  # quartile distances beyond the quartiles: Tukey's outer fences

# A point of a learning curve: mean and SD over n runs, and those of the logarithm of base 10 over
# positive values. `metric` and `g` are positions in `ChartData.metrics` and `.groups`.
Point = namedtuple("Point", "metric split g step epoch mean sd n log log_sd")

# Quantity, group and layer, as positions in `ChartData`, at a step `s`. Mean and SD over runs of
# the median over units; `d` holds the percentiles `LEVELS` of all n values, of which `beyond` lie
# outside of the axis [low, high].
Cell = namedtuple("Cell", "q g l s n runs mean sd d low high beyond")


@dataclass
class ChartData:
    """What the charts show, and sentences about what they leave out.

    Args:
        groups: The groups of runs, each a line of every chart.
        layers: Names of the layers, from the input of the network to its output.
        quantities: Names of what was measured of layers and units.
        ranges: Of each quantity, the limits of the colors and a small value of its size.
        cells: The cells of the heat map, those of `ALL_LAYERS` included.
        metrics: Names of what was measured of the whole network, loss and error first.
        points: The points of the learning curves.
        left_out: One sentence for each thing that is not on the page.
        thinned: The quantities of which fewer values are shown, by the words for what is shown.
    """

    groups: list[RunGroup]
    layers: list[str]
    quantities: list[str] = field(default_factory=list)
    ranges: list[tuple[float, float, float]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    thinned: dict[str, list[str]] = field(default_factory=dict)


def chart_data(table: pd.DataFrame, states: pd.DataFrame, groups: Sequence[RunGroup]) -> ChartData:
    """Returns the curves of the whole network and the cells (quantity, group, layer, step).

    A cell holds the median over units of each run, as mean and SD over runs, and the percentiles
    over units and runs together.

    Args:
        table: The rows of `biasshift.runs.reader.read_runs`.
        states: The runs, as `run_states` lists them; its columns are no quantities.
        groups: All groups, those that are not shown included.
    """
    shown = [group for group in groups if group.shown]
    hidden = [group.label for group in groups if not group.shown]
    names = by_depth([str(name) for name in table["layer"].cat.categories if name != ""])
    data = ChartData(shown, distinct([plain(name, 60) for name in names]))
    if hidden:
        rule = f"Learning rates: {RULE}. " if "lr" in states else ""
        data.left_out.append(
            f"The charts show {len(shown)} of {len(groups)} groups of runs. {rule}They leave out "
            f"{listed(hidden)}."
        )
    keys = _keys(table, shown, names)
    columns = [name for name in table if name not in _KEYS and name not in states]

    def values(rows: pd.Series) -> dict[str, pd.DataFrame]:
        return {name: _values(data, table[name], keys, rows) for name in columns}

    _add_curves(data, values(keys["layer"] == _NETWORK), _epochs(table, keys))
    _add_cells(data, values(keys["layer"] >= 0))
    data.left_out += [
        f"{kept}: {listed(labels, MAX_QUANTITIES)}." for kept, labels in data.thinned.items()
    ]
    return data


def _keys(table: pd.DataFrame, groups: Sequence[RunGroup], names: Sequence[str]) -> pd.DataFrame:
    """Of each row of the table: the positions of its group and layer (-1: in no chart), its run,
    step and unit.
    """
    group_of = {run: position for position, group in enumerate(groups) for run in group.runs}
    layer_of = {name: position for position, name in enumerate(names)}
    run, layer = table["run"].cat, table["layer"].cat
    group = np.array([group_of.get(str(name), -1) for name in run.categories], np.int16)[run.codes]
    place = [layer_of.get(str(name), _NETWORK) for name in layer.categories]
    # Examinations at equal loss are repeated over probes and dampings: they stand at no step of a
    # chart.
    trained = table["exam_damping"].isna().to_numpy() if "exam_damping" in table else True
    columns = {
        "group": group,
        "layer": np.where((group >= 0) & trained, np.array(place, np.int32)[layer.codes], _NOWHERE),
        "run": run.codes.to_numpy(),
        "step": table["step"],
        "unit": table["unit"],
    }
    return pd.DataFrame(columns, copy=False)


def _values(
    data: ChartData, column: pd.Series, keys: pd.DataFrame, where: pd.Series
) -> pd.DataFrame:
    """The keys and the `value` of the rows that have one. Only these are copied: the table may fill
    the memory.
    """
    rows = np.flatnonzero(where.to_numpy() & column.notna().to_numpy())
    values = column.to_numpy()[rows].astype(np.float64)
    finite = np.abs(values) < LARGEST
    if not finite.all():
        data.left_out.append(
            f"'{plain(column.name, 60)}': {(~finite).sum():,} of {len(values):,} values are "
            f"infinite or beyond {LARGEST:g}."
        )
    return keys.iloc[rows[finite]].assign(value=values[finite])


# -- curves of the whole network -------------------------------------------------------------------


def _add_curves(data: ChartData, values: dict[str, pd.DataFrame], epochs: dict[Any, Any]) -> None:
    values = {name: rows for name, rows in values.items() if len(rows)}
    splits = {name: _SPLIT.fullmatch(name) for name in values}
    parts = {name: (split[2], split[1]) if split else (name, "") for name, split in splits.items()}
    metrics = dict.fromkeys(metric for metric, _ in parts.values())
    names = sorted(metrics, key=lambda name: {"loss": 0, "error": 1}.get(name, 2))
    names = first(names, MAX_QUANTITIES, "quantities of the whole network", data.left_out)
    data.metrics = all_in_words(names)
    curves = len(values) * len(data.groups)
    most = max(2, min(MAX_POINTS_PER_CURVE, MAX_POINTS // max(1, curves)))
    for column, (metric, split) in parts.items():
        if metric not in names:
            continue
        rows = _thinned(data, values[column], most, plain(in_words(column), 60))
        by_run = rows.groupby(["group", "step", "run"])["value"].mean()
        scales = [by_run, by_run.where(by_run > 0).map(np.log10)]
        grouped = [scale.groupby(level=["group", "step"]) for scale in scales]
        lines = pd.concat([runs.agg(["mean", "std"]) for runs in grouped], axis=1)
        for (g, step), n, line in zip(
            lines.index, grouped[0].size(), lines.to_numpy(), strict=True
        ):
            mean, sd, log, log_sd = (rounded(value, 4) for value in line)
            place = (names.index(metric), split, int(g), int(step), epochs.get((g, step)))
            data.points.append(Point(*place, mean, sd, int(n), log, log_sd))


def _epochs(table: pd.DataFrame, keys: pd.DataFrame) -> dict[Any, Any]:
    """(group, step) → epoch, its median over runs."""
    if "epoch" not in table:
        return {}
    rows = keys[(keys["layer"] == _NETWORK) & table["epoch"].notna().to_numpy()]
    rows = rows.assign(epoch=table["epoch"].to_numpy()[rows.index])
    medians = rows.groupby(["group", "step"])["epoch"].median()
    return {key: rounded(epoch, 6) for key, epoch in medians.items()}


# -- cells of layers and steps ---------------------------------------------------------------------


def _add_cells(data: ChartData, values: dict[str, pd.DataFrame]) -> None:
    columns = [name for name, rows in values.items() if len(rows)]
    columns = first(columns, MAX_QUANTITIES, "quantities of layers", data.left_out)
    layers = {
        column: evenly_spaced(np.unique(values[column]["layer"]).tolist(), MAX_LAYERS)
        for column in columns
    }
    cells_a_step = sum(len(chosen) + 1 for chosen in layers.values()) * len(data.groups)
    most = max(1, min(MAX_STEPS, MAX_CELLS // max(1, cells_a_step)))
    data.quantities = all_in_words(columns)
    for position, (column, label) in enumerate(zip(columns, data.quantities, strict=True)):
        rows = values[column]
        of_units = rows["unit"] >= 0
        if of_units.any() and not of_units.all():
            shown = "Values of whole layers, where units were measured, too"
            data.thinned.setdefault(shown, []).append(label)
            rows = rows[of_units]
        if (count := rows["layer"].nunique()) > MAX_LAYERS:
            shown = f"{MAX_LAYERS} of {count:,} layers, evenly chosen"
            data.thinned.setdefault(shown, []).append(label)
        rows = _thinned(data, rows[rows["layer"].isin(layers[column])], most, label)
        cells = _cells(rows, position)
        means = np.array([cell.mean for cell in cells])
        least, greatest = (float(limit) for limit in np.quantile(means, [0.02, 0.98]))
        small = np.quantile(np.abs(means[means != 0]), 0.1) if means.any() else 1.0
        data.ranges.append((least, greatest, float(small)))
        data.cells += cells + _cells(rows.assign(layer=ALL_LAYERS), position)


def _cells(rows: pd.DataFrame, quantity: int) -> list[Cell]:
    keys = ["group", "layer", "step"]
    medians = rows.groupby([*keys, "run"])["value"].median()
    over_runs = medians.groupby(level=keys).agg(["mean", "std", "count"])
    pooled = rows.groupby(keys)["value"]
    percentiles = pooled.quantile([level / 100 for level in LEVELS]).unstack()
    limits = axis_limits(percentiles.set_axis(list(LEVELS), axis=1), DRAWN, keys[1:])
    limits = limits.map(rounded, digits=3).to_numpy(float)
    place, value = pooled.ngroup().to_numpy(), rows["value"].to_numpy()
    outside = (value < limits[place, 0]) | (value > limits[place, 1])
    cells = zip(
        over_runs.index,
        pooled.size(),
        over_runs.to_numpy(),
        percentiles.to_numpy(),
        limits,
        np.bincount(place, outside, len(limits)),
        strict=True,
    )
    return [
        Cell(
            q=quantity,
            g=int(group),
            l=int(layer),
            s=int(step),
            n=int(n),
            runs=int(runs),
            mean=rounded(mean, 4),
            sd=rounded(sd, 3),
            d=[rounded(value, 3) for value in levels],
            low=rounded(low, 3),
            high=rounded(high, 3),
            beyond=int(beyond),
        )
        for (group, layer, step), n, (mean, sd, runs), levels, (low, high), beyond in cells
    ]


# -- as many values as a page can hold -------------------------------------------------------------


def first(names: list[str], most: int, kind: str, left_out: list[str]) -> list[str]:
    """Returns the first ``most`` names, and notes in ``left_out`` which others there are.

    >>> left_out = []
    >>> first(["a", "b", "c"], 2, "quantities", left_out), left_out
    (['a', 'b'], ['1 of 3 quantities: c.'])
    """
    if len(names) > most:
        hidden = len(names) - most
        left_out.append(f"{hidden} of {len(names)} {kind}: {listed(map(in_words, names[most:]))}.")
    return names[:most]


def _thinned(data: ChartData, values: pd.DataFrame, most: int, label: str) -> pd.DataFrame:
    """The rows of `most` steps of each group, evenly chosen."""
    steps = {group: measured.unique() for group, measured in values.groupby("group")["step"]}
    longest = max(map(len, steps.values()), default=0)
    if longest <= most:
        return values
    shown = f"{most} of {longest:,} measured steps, evenly chosen"
    data.thinned.setdefault(shown, []).append(label)
    kept = [
        values.loc[
            (values["group"] == group) & values["step"].isin(evenly_spaced(sorted(measured), most))
        ]
        for group, measured in steps.items()
    ]
    return pd.concat(kept)


def evenly_spaced(values: Sequence[Any], most: int) -> list[Any]:
    """Returns at most so many of the values, the last always and the first from two on.

    >>> evenly_spaced(range(101), 5)
    [0, 25, 50, 75, 100]
    """
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def rounded(value: Any, digits: int) -> float | int | None:
    """Returns a number with so many significant digits, as short JSON has it.

    Whole numbers become integers; None and NaN become None, which JSON writes as ``null``.

    >>> rounded(0.123456, 3), rounded(2.0001, 3), rounded(float("nan"), 3)
    (0.123, 2, None)
    """
    if value is None or value != value:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def by_depth(names: Sequence[str]) -> list[str]:
    """Returns the names of layers in the order in which they lie in the network.

    Words keep the order in which they first occur, numbers are sorted by size. The table alone does
    not tell: it holds weight layers and activations one behind the other, each in their own order.

    >>> by_depth(["features.0", "features.10", "classifier.1", "features.1", "classifier.0"])
    ['features.0', 'features.1', 'features.10', 'classifier.0', 'classifier.1']
    """
    parts = {name: re.split(r"([0-9]{1,9})", name) for name in names}  # words and numbers by turns
    order: dict[str, int] = {}
    for words in parts.values():
        for word in words[::2]:
            order.setdefault(word, len(order))
    return sorted(
        names,
        key=lambda name: [
            int(part) if turn % 2 else order[part] for turn, part in enumerate(parts[name])
        ],
    )


def axis_limits(
    percentiles: pd.DataFrame, drawn: Sequence[int], within: Sequence[str]
) -> pd.DataFrame:
    """Returns where an axis begins and ends, so that one long tail does not stretch it.

    The limits are the outermost of the ``drawn`` percentiles that lie inside of any fence, which
    stands `_FENCE` quartile distances beyond the quartiles of one distribution.

    Args:
        percentiles: A row per distribution, a column per percentile, 25 and 75 among them.
        drawn: The percentiles in the chart; the other half of each pair is 100 minus it.
        within: Levels of the index; rows that are equal in these share an axis.

    Returns:
        Columns ``low`` and ``high``, for each row.
    """
    spread = percentiles[75] - percentiles[25]
    # Where half of the units are dead, the quartiles are equal: a wider pair takes their place.
    for low in sorted((level for level in drawn if level < 25), reverse=True):
        spread = spread.where(spread > 0, percentiles[100 - low] - percentiles[low])
    least = (percentiles[25] - _FENCE * spread).groupby(level=within).transform("min")
    greatest = (percentiles[75] + _FENCE * spread).groupby(level=within).transform("max")
    values = percentiles[list(drawn)]
    inside = values.where(values.ge(least, axis=0) & values.le(greatest, axis=0))
    low, high = inside.min(axis=1).groupby(level=within), inside.max(axis=1).groupby(level=within)
    return pd.DataFrame({"low": low.transform("min"), "high": high.transform("max")})
