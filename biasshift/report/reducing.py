"""The tidy table → the few thousand numbers that a page can hold, and sentences about what was left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biasshift.report.series import MOST_SERIES, Series
from biasshift.report.text import listed, plain, told_apart

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 18_000  # (quantity, series, layer, step): about 140 bytes each
MOST_POINTS = 12_000  # of all learning curves
MOST_STEPS, MOST_LAYERS, MOST_QUANTITIES = 40, 32, 40
POINTS_A_CURVE = 150
LEVELS = (0, 5, 10, 25, 50, 75, 90, 95, 100)  # percentiles of the values in a cell
ALL_LAYERS = -1
_SPLIT = re.compile(r"(train|valid|test)_(.+)")
_NO_QUANTITY = {"step", "layer", "unit", "run", "epoch", "inputs", "series_"}
CELL_COLUMNS = ["q", "g", "l", "s", "n", "runs", "mean", "sd", "d"]
CURVE_COLUMNS = ["metric", "split", "g", "step", "epoch", "mean", "sd", "n"]


@dataclass
class Reduced:
    """What the charts show. `g`, `q`, `l` and `metric` are positions in the lists of names."""

    series: list[Series]
    layers: list[str]
    quantities: list[str] = field(default_factory=list)
    ranges: list[tuple[float, float]] = field(default_factory=list)  # of each quantity's colors
    cells: list[list[Any]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    points: list[list[Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    thinned: dict[str, list[str]] = field(default_factory=dict)  # how → what


def reduced(table: pd.DataFrame, states: pd.DataFrame, series: Sequence[Series]) -> Reduced:
    """Returns the cells (median over units per run, then mean and SD over runs; percentiles over units and runs) and the curves."""
    import numpy as np

    shown = list(series[:MOST_SERIES])
    of_run = {run: position for position, one in enumerate(shown) for run in one.runs}
    codes = np.array([of_run.get(str(run), -1) for run in table["run"].cat.categories], dtype=np.int64)
    table = table.assign(series_=codes[table["run"].cat.codes])
    names = [str(name) for name in table["layer"].cat.categories if name != ""]
    found = Reduced(shown, told_apart([plain(name, 60) for name in names]))
    if len(series) > len(shown):
        found.left_out.append(
            f"{len(series) - len(shown)} of {len(series)} groups of runs, the smallest: {listed(s.label for s in series[MOST_SERIES:])}."
        )
    table = table.loc[table["series_"] >= 0]
    measured = [name for name in table if name not in _NO_QUANTITY and name not in states]
    at_a_step = table["exam_damping"].isna() if "exam_damping" in table else np.ones(len(table), dtype=bool)
    _add_curves(found, table.loc[(table["layer"] == "") & at_a_step], measured)
    _add_cells(found, table.loc[(table["layer"] != "") & at_a_step], measured, names)
    found.left_out += [f"{how}: {listed(what, MOST_QUANTITIES)}." for how, what in found.thinned.items()]
    return found


# -- curves of the whole network ---------------------------------------------------------------------------------


def _add_curves(found: Reduced, rows: pd.DataFrame, measured: list[str]) -> None:
    columns = [name for name in measured if rows[name].notna().any()]
    pairs = [(match[2], match[1]) if (match := _SPLIT.fullmatch(name)) else (name, "") for name in columns]
    names = list(dict.fromkeys(metric for metric, _ in pairs))
    names.sort(key=lambda name: ["loss", "error"].index(name) if name in ("loss", "error") else 2)
    if len(names) > MOST_QUANTITIES:
        found.left_out.append(f"Learning curves of {len(names) - MOST_QUANTITIES} quantities: {listed(names[MOST_QUANTITIES:])}.")
        names = names[:MOST_QUANTITIES]
    found.metrics = told_apart([plain(name, 60) for name in names])
    most = max(2, min(POINTS_A_CURVE, MOST_POINTS // max(1, len(columns) * len(found.series))))
    for column, (metric, split) in zip(columns, pairs, strict=True):
        if metric not in names:
            continue
        values = _finite(found, rows, column, ["series_", "run", "step"])
        values = _thinned(found, values, most, plain(column, 60))
        by_run = values.groupby(["series_", "run", "step"], observed=True)[column].mean().reset_index()
        lines = by_run.groupby(["series_", "step"])[column].agg(["mean", "std", "count"])
        epochs = rows.groupby(["series_", "step"])["epoch"].median() if "epoch" in rows else None
        for (group, step), row in lines.iterrows():
            epoch = None if epochs is None else _rounded(epochs.get((group, step)), 6)
            numbers = [_rounded(row["mean"], 4), _rounded(row["std"], 3), int(row["count"])]
            found.points.append([names.index(metric), split, int(group), int(step), epoch, *numbers])


# -- layers and units --------------------------------------------------------------------------------------------


def _add_cells(found: Reduced, rows: pd.DataFrame, measured: list[str], names: list[str]) -> None:
    import numpy as np

    columns = [name for name in measured if rows[name].notna().any()]
    if len(columns) > MOST_QUANTITIES:
        found.left_out.append(f"{len(columns) - MOST_QUANTITIES} quantities of layers: {listed(columns[MOST_QUANTITIES:])}.")
        columns = columns[:MOST_QUANTITIES]
    codes = {name: code for code, name in enumerate(names)}
    position = np.array([codes.get(str(name), ALL_LAYERS) for name in rows["layer"].cat.categories], dtype=np.int64)
    rows = rows.assign(layer=position[rows["layer"].cat.codes])
    layers = {column: _even(np.unique(rows["layer"][rows[column].notna()]), MOST_LAYERS) for column in columns}
    a_step = sum(len(some) + 1 for some in layers.values()) * len(found.series)
    most = max(1, min(MOST_STEPS, MOST_CELLS // max(1, a_step)))
    labels = told_apart([plain(name, 60) for name in columns])
    for column, label in zip(columns, labels, strict=True):
        values = _finite(found, rows, column, ["series_", "run", "layer", "step", "unit"])
        values = values.loc[values["unit"] >= 0] if (values["unit"] >= 0).any() else values
        if dropped := values["layer"].nunique() - values["layer"].isin(layers[column]).groupby(values["layer"]).first().sum():
            found.left_out.append(f"'{label}': {dropped} layers between those shown.")
        values = values.loc[values["layer"].isin(layers[column])]
        values = _thinned(found, values, most, label)
        if len(values):
            found.quantities.append(label)
            each = _cells(values, column, len(found.quantities) - 1)
            means = [cell[6] for cell in each]
            found.ranges.append((float(np.quantile(means, 0.02)), float(np.quantile(means, 0.98))))
            found.cells += each + _cells(values.assign(layer=ALL_LAYERS), column, len(found.quantities) - 1)


def _cells(values: pd.DataFrame, column: str, quantity: int) -> list[list[Any]]:
    keys = ["series_", "layer", "step"]
    medians = values.groupby([*keys, "run"], observed=True)[column].median()
    over_runs = medians.groupby(level=keys).agg(["mean", "std", "count"])
    pooled = values.groupby(keys)[column]
    percentiles, sizes = pooled.quantile([level / 100 for level in LEVELS]).unstack(), pooled.size()
    return [
        [quantity, int(g), int(layer), int(step), int(n), int(runs), _rounded(mean, 4), _rounded(sd, 3), [_rounded(x, 3) for x in some]]
        for (g, layer, step), n, (mean, sd, runs), some in zip(
            over_runs.index, sizes, over_runs.to_numpy(), percentiles.to_numpy(), strict=True
        )
    ]  # fmt: skip


# -- thinning ----------------------------------------------------------------------------------------------------


def _finite(found: Reduced, rows: pd.DataFrame, column: str, keys: list[str]) -> pd.DataFrame:
    import numpy as np

    values = rows.loc[rows[column].notna(), [*keys, column]].astype({column: "float64"})
    finite = np.isfinite(values[column].to_numpy())
    if not finite.all():
        found.left_out.append(f"'{plain(column, 60)}': {len(values) - finite.sum():,} of {len(values):,} values are infinite.")
    return values.loc[finite]


def _thinned(found: Reduced, values: pd.DataFrame, most: int, what: str) -> pd.DataFrame:
    """Evenly chosen steps of each series, the first and the last among them."""
    import pandas as pd

    steps = {group: some.unique() for group, some in values.groupby("series_")["step"]}
    if not any(len(some) > most for some in steps.values()):
        return values
    how = f"{most} of {max(map(len, steps.values())):,} measured steps, evenly chosen"
    found.thinned.setdefault(how, []).append(what)
    kept = [values.loc[(values["series_"] == group) & values["step"].isin(_even(sorted(some), most))] for group, some in steps.items()]
    return pd.concat(kept)


def _even(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the last and (from two on) the first."""
    if len(values) <= most:
        return list(values)
    gaps = max(1, most - 1)
    return [values[-1]] if most == 1 else [values[round(i * (len(values) - 1) / gaps)] for i in range(most)]


def _rounded(value: Any, digits: int) -> float | int | None:
    if value is None or value != value:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
