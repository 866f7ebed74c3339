"""The tidy table → the few thousand numbers that a page can hold, and sentences about what was left
out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biasshift.analysis.grid import RULE
from biasshift.report.groups import Series
from biasshift.report.html import listed, plain, told_apart

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 18_000  # (quantity, series, layer, step): about 140 bytes each
MOST_POINTS = 12_000  # of all learning curves
MOST_STEPS, MOST_LAYERS, MOST_QUANTITIES = 40, 32, 40
POINTS_A_CURVE = 150
DRAWN = (
    5,
    10,
    25,
    50,
    75,
    90,
    95,
)  # percentiles: without the least and the largest of thousands, one could squeeze all others
LEVELS = (0, *DRAWN, 100)  # percentiles of the values in a cell
ALL_LAYERS = -1
_NETWORK, _NOWHERE = (
    -2,
    -3,
)  # layers of rows about the whole network, and of rows that are in no chart
LARGEST = 1e150  # squares of larger numbers may overflow
_SPLIT = re.compile(r"(train|valid|test)_(.+)")
_NO_QUANTITY = {"step", "layer", "unit", "run", "epoch", "inputs"}
CELL_COLUMNS = [
    "q",
    "g",
    "l",
    "s",
    "n",
    "runs",
    "mean",
    "sd",
    "d",
    "low",
    "high",
    "beyond",
]  # beyond: values outside of [low, high]
CURVE_COLUMNS = [
    "metric",
    "split",
    "g",
    "step",
    "epoch",
    "mean",
    "sd",
    "n",
    "log",
    "log_sd",
]  # log: of base 10, over positive values
_FENCE = 3  # quartile distances beyond the quartiles: Tukey's outer fences


@dataclass
class Reduced:
    """What the charts show. `g`, `q`, `l` and `metric` are positions in the lists of names."""

    series: list[Series]
    layers: list[str]
    quantities: list[str] = field(default_factory=list)
    ranges: list[tuple[float, float, float]] = field(
        default_factory=list
    )  # of each quantity's colors, and a small value
    cells: list[list[Any]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    points: list[list[Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    thinned: dict[str, list[str]] = field(default_factory=dict)  # how → what


def reduced(table: pd.DataFrame, states: pd.DataFrame, series: Sequence[Series]) -> Reduced:
    """Returns the cells (median over units per run, then mean and SD over runs; percentiles over
    units and runs) and the curves.
    """
    shown, hidden = (
        [one for one in series if one.shown],
        [one.label for one in series if not one.shown],
    )
    names = by_depth([str(name) for name in table["layer"].cat.categories if name != ""])
    found = Reduced(shown, told_apart([plain(name, 60) for name in names]))
    if hidden:
        how = f"Learning rates: {RULE}. " if "lr" in states else ""
        found.left_out.append(
            f"The charts show {len(shown)} of {len(series)} groups of runs. {how}They leave out "
            f"{listed(hidden)}."
        )
    keys = _keys(table, shown, names)
    columns = [name for name in table if name not in _NO_QUANTITY and name not in states]
    _add_curves(
        found,
        {name: _values(found, table[name], keys, keys["layer"] == _NETWORK) for name in columns},
        keys,
        table,
    )
    _add_cells(
        found, {name: _values(found, table[name], keys, keys["layer"] >= 0) for name in columns}
    )
    found.left_out += [
        f"{how}: {listed(what, MOST_QUANTITIES)}." for how, what in found.thinned.items()
    ]
    return found


def _keys(table: pd.DataFrame, series: Sequence[Series], names: Sequence[str]) -> pd.DataFrame:
    """Of each row of the table: the positions of its series and layer (-1: in no chart), its run,
    step and unit.
    """
    import numpy as np
    import pandas as pd

    group_of = {run: position for position, one in enumerate(series) for run in one.runs}
    groups = np.array(
        [group_of.get(str(run), -1) for run in table["run"].cat.categories], dtype=np.int16
    )
    layer_of = {name: position for position, name in enumerate(names)}
    layers = np.array(
        [layer_of.get(str(name), _NETWORK) for name in table["layer"].cat.categories],
        dtype=np.int32,
    )
    group, layer = groups[table["run"].cat.codes], layers[table["layer"].cat.codes]
    # Examinations at equal loss are repeated over probes and dampings: they stand at no step of a
    # chart.
    charted = (group >= 0) & (
        table["exam_damping"].isna().to_numpy() if "exam_damping" in table else True
    )
    run = table["run"].cat.codes.to_numpy()
    where = {
        "group": group,
        "layer": np.where(charted, layer, _NOWHERE),
        "run": run,
        "step": table["step"],
        "unit": table["unit"],
    }
    return pd.DataFrame(where, copy=False)


def _values(
    found: Reduced, column: pd.Series, keys: pd.DataFrame, where: pd.Series
) -> pd.DataFrame:
    """The keys and the `value` of the rows that have one. Only these are copied: the table may fill
    the memory.
    """
    import numpy as np

    rows = np.flatnonzero(where.to_numpy() & column.notna().to_numpy())
    values = column.to_numpy()[rows].astype(np.float64)
    finite = np.abs(values) < LARGEST
    if not finite.all():
        found.left_out.append(
            f"'{plain(column.name, 60)}': {(~finite).sum():,} of {len(values):,} values are "
            f"infinite or beyond {LARGEST:g}."
        )
    return keys.iloc[rows[finite]].assign(value=values[finite])


# -- curves of the whole network -------------------------------------------------------------------


def _add_curves(
    found: Reduced, values: dict[str, pd.DataFrame], keys: pd.DataFrame, table: pd.DataFrame
) -> None:
    import numpy as np
    import pandas as pd

    values = {name: some for name, some in values.items() if len(some)}
    parts = {
        name: (match[2], match[1]) if (match := _SPLIT.fullmatch(name)) else (name, "")
        for name in values
    }
    names = list(dict.fromkeys(metric for metric, _ in parts.values()))
    names.sort(key=lambda name: ["loss", "error"].index(name) if name in ("loss", "error") else 2)
    names = _first(found, names, "quantities of the whole network")
    found.metrics = told_apart([plain(name, 60) for name in names])
    most = max(2, min(POINTS_A_CURVE, MOST_POINTS // max(1, len(values) * len(found.series))))
    epochs = _epochs(table, keys)
    for column, (metric, split) in parts.items():
        if metric in names:
            by_run = (
                _thinned(found, values[column], most, plain(column, 60))
                .groupby(["group", "step", "run"])["value"]
                .mean()
            )
            logs = by_run.where(by_run > 0).map(np.log10)
            lines = pd.concat(
                [
                    some.groupby(level=["group", "step"]).agg(["mean", "std"])
                    for some in (by_run, logs)
                ],
                axis=1,
            )
            spreads = [[rounded(value, 4) for value in row] for row in lines.to_numpy()]
            counts = by_run.groupby(level=["group", "step"]).size()
            found.points += [
                [
                    names.index(metric),
                    split,
                    int(g),
                    int(step),
                    epochs.get((g, step)),
                    *spread[:2],
                    int(n),
                    *spread[2:],
                ]
                for (g, step), n, spread in zip(lines.index, counts, spreads, strict=True)
            ]


def _epochs(table: pd.DataFrame, keys: pd.DataFrame) -> dict[Any, Any]:
    if "epoch" not in table:
        return {}
    rows = keys[(keys["layer"] == _NETWORK) & table["epoch"].notna().to_numpy()]
    medians = (
        rows.assign(epoch=table["epoch"].to_numpy()[rows.index])
        .groupby(["group", "step"])["epoch"]
        .median()
    )
    return {key: rounded(epoch, 6) for key, epoch in medians.items()}


# -- layers and units ------------------------------------------------------------------------------


def _add_cells(found: Reduced, values: dict[str, pd.DataFrame]) -> None:
    import numpy as np

    columns = _first(
        found, [name for name, some in values.items() if len(some)], "quantities of layers"
    )
    layers = {
        column: even(np.unique(values[column]["layer"]).tolist(), MOST_LAYERS) for column in columns
    }
    cells_a_step = sum(len(some) + 1 for some in layers.values()) * len(found.series)
    most = max(1, min(MOST_STEPS, MOST_CELLS // max(1, cells_a_step)))
    found.quantities = told_apart([plain(name, 60) for name in columns])
    for position, (column, label) in enumerate(zip(columns, found.quantities, strict=True)):
        rows = values[column]
        of_units = rows["unit"] >= 0
        if of_units.any() and not of_units.all():
            found.thinned.setdefault(
                "Values of whole layers, of what was measured of units, too", []
            ).append(label)
            rows = rows[of_units]
        if (measured := rows["layer"].nunique()) > MOST_LAYERS:
            found.thinned.setdefault(
                f"{MOST_LAYERS} of {measured:,} layers, evenly chosen", []
            ).append(label)
        rows = _thinned(found, rows[rows["layer"].isin(layers[column])], most, label)
        each = _cells(rows, position)
        means = np.array([cell[6] for cell in each])
        small = np.quantile(np.abs(means[means != 0]), 0.1) if means.any() else 1.0
        found.ranges.append(
            (*(float(limit) for limit in np.quantile(means, [0.02, 0.98])), float(small))
        )
        found.cells += each + _cells(rows.assign(layer=ALL_LAYERS), position)


def _cells(rows: pd.DataFrame, quantity: int) -> list[list[Any]]:
    import numpy as np

    keys = ["group", "layer", "step"]
    over_runs = (
        rows.groupby([*keys, "run"])["value"]
        .median()
        .groupby(level=keys)
        .agg(["mean", "std", "count"])
    )
    pooled = rows.groupby(keys)["value"]
    percentiles, sizes = pooled.quantile([level / 100 for level in LEVELS]).unstack(), pooled.size()
    limits = (
        ends(percentiles.set_axis(list(LEVELS), axis=1), DRAWN, keys[1:])
        .map(rounded, digits=3)
        .to_numpy(float)
    )
    place, value = pooled.ngroup().to_numpy(), rows["value"].to_numpy()
    beyond = np.bincount(
        place, (value < limits[place, 0]) | (value > limits[place, 1]), len(limits)
    )
    return [
        [
            quantity, int(g), int(layer), int(step), int(n), int(runs), rounded(mean, 4), rounded(sd, 3),
            [rounded(x, 3) for x in some], rounded(low, 3), rounded(high, 3), int(out),
        ]
        for (g, layer, step), n, (mean, sd, runs), some, (low, high), out in zip(
            over_runs.index, sizes, over_runs.to_numpy(), percentiles.to_numpy(), limits, beyond, strict=True
        )
    ]  # fmt: skip


def _first(found: Reduced, names: list[str], what: str) -> list[str]:
    if len(names) > MOST_QUANTITIES:
        found.left_out.append(
            f"{len(names) - MOST_QUANTITIES} of {len(names)} {what}: "
            f"{listed(names[MOST_QUANTITIES:])}."
        )
    return names[:MOST_QUANTITIES]


def _thinned(found: Reduced, values: pd.DataFrame, most: int, what: str) -> pd.DataFrame:
    """Evenly chosen steps of each series, the first and the last among them."""
    import pandas as pd

    steps = {group: some.unique() for group, some in values.groupby("group")["step"]}
    if not any(len(some) > most for some in steps.values()):
        return values
    how = f"{most} of {max(map(len, steps.values())):,} measured steps, evenly chosen"
    found.thinned.setdefault(how, []).append(what)
    kept = [
        values.loc[(values["group"] == group) & values["step"].isin(even(sorted(some), most))]
        for group, some in steps.items()
    ]
    return pd.concat(kept)


# -- many values → as many as a page can hold --------------------------------------------------


def even(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the last and (from two on) the first."""
    if len(values) <= most:
        return list(values)
    gaps = max(1, most - 1)
    return (
        [values[-1]]
        if most == 1
        else [values[round(i * (len(values) - 1) / gaps)] for i in range(most)]
    )


def rounded(value: Any, digits: int) -> float | int | None:
    if value is None or value != value:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def by_depth(names: Sequence[str]) -> list[str]:
    """The names of layers as they lie in the network: words in the order in which they first occur,
    numbers by size.

    Those of weight layers and of activations are recorded one behind the other, each in their own
    order.

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


def ends(percentiles: pd.DataFrame, drawn: Sequence[int], within: Sequence[str]) -> pd.DataFrame:
    """Where an axis begins and ends that one long tail may not stretch: the outermost of the
    `drawn` percentiles inside of any fence.

    Args:
        percentiles: a row per distribution, a column per percentile, 25 and 75 among them.
        drawn: which of them are in the chart; the other half of each pair is 100 minus it.
        within: levels of the index; rows that are equal in these share an axis.

    Returns:
        Columns ``low`` and ``high``, for each row.
    """
    spread = percentiles[75] - percentiles[25]
    for low in sorted((level for level in drawn if level < 25), reverse=True):
        spread = spread.where(
            spread > 0, percentiles[100 - low] - percentiles[low]
        )  # of half of the units dead, the quartiles are equal
    least = (percentiles[25] - _FENCE * spread).groupby(level=within).transform("min")
    most = (percentiles[75] + _FENCE * spread).groupby(level=within).transform("max")
    shown = percentiles[list(drawn)]
    shown = shown.where(shown.ge(least, axis=0) & shown.le(most, axis=0))
    found = shown.min(axis=1).to_frame("low").assign(high=shown.max(axis=1)).groupby(level=within)
    return found["low"].transform("min").to_frame("low").assign(high=found["high"].transform("max"))
