"""Reductions of the tidy table, from table to table: whoever doubts a picture can print what it
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def with_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with `epoch` in every row, interpolated over the steps of the run's
    whole-network rows.

    Only those rows carry the epoch. Step 0 is epoch 0; beyond a run's last record its average pace
    goes on.

    Raises:
        ValueError: a run has no epochs.
    """
    import numpy as np

    need(table, ["step", "epoch"], "the epochs")
    epoch = table["epoch"].to_numpy(float, copy=True)
    for rows in _rows_by_run(table):
        step = table["step"].to_numpy(float)[rows]
        known = ~np.isnan(epoch[rows])
        marks = dict(
            sorted({0.0: 0.0, **dict(zip(step[known], epoch[rows][known], strict=True))}.items())
        )
        x, y = np.array(list(marks)), np.array(list(marks.values()))
        pace = (y[-1] - y[0]) / (x[-1] - x[0]) if len(x) > 1 else np.nan
        between = np.where(step > x[-1], y[-1] + (step - x[-1]) * pace, np.interp(step, x, y))
        epoch[rows] = np.where(known, epoch[rows], between)
    if np.isnan(epoch).any():
        raise ValueError("a run of this table has no rows with an epoch: draw it against='step'")
    return table.assign(epoch=epoch)


def median_over_units(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns one row per run and combination of `keys`: the median of `column` over all units of
    all layers.

    Raises:
        ValueError: the table is empty, or has no such column, or no unit has a value in it.
    """
    need(table, ["unit", column, *keys], f"the median of '{column}'")
    units = table.loc[(table["unit"] >= 0) & table[column].notna()]
    need(units, [], f"the median of '{column}' over units")
    return (
        units.groupby([*keys, *_of_run(table, keys)], observed=True, sort=True)[column]
        .median()
        .reset_index()
    )


def mean_and_sd_over_seeds(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns one row per combination of `keys`: mean and standard deviation (n − 1) of `column`,
    and n, the runs.

    Raises:
        ValueError: nothing to average, or runs of different settings would be averaged (one seed
            comes twice).
    """
    need(table, [column, *keys], f"the mean of '{column}'")
    rows = table.loc[table[column].notna()]
    need(rows, [], f"the mean of '{column}'")
    run = [
        name for name in ("seed", "run") if name in rows and len(rows[name].dropna()) == len(rows)
    ][:1]
    twice = rows.loc[rows.duplicated([*keys, *run])]
    if len(twice):
        where = ", ".join(f"{key} = {twice.iloc[0][key]}" for key in [*keys, *run])
        raise ValueError(
            f"two values of '{column}' at {where}: keep one setting of the runs, and one row per "
            "run and step"
        )
    found = rows.groupby(list(keys), observed=True, sort=True)[column].agg(
        mean="mean", sd="std", n="size"
    )
    return found.reset_index()


def median_over_runs(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns one row per combination of `keys`: the median of `column` as `mean`, no `sd`, and n,
    the runs.

    Raises:
        ValueError: as `mean_and_sd_over_seeds`.
    """
    found = mean_and_sd_over_seeds(table, column, keys)
    rows = table.loc[table[column].notna()]
    medians = rows.groupby(list(keys), observed=True, sort=True)[column].median().to_numpy()
    return found.assign(mean=medians, sd=float("nan"))


def gap_points(
    table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False
) -> pd.DataFrame:
    """Returns one row per run, layer and step: `mean_in_abs`, and `degrees`, the angle between the
    two gradients.

    Args:
        layers: keep these only.
        skip_input: leave out the first layer of each run, whose incoming activations are the data.
    """
    import numpy as np

    need(table, ["step", "layer", "unit", "mean_in_abs", "cos_gradient"], "the gradient gap")
    rows = table.loc[(table["unit"] == -1) & table["mean_in_abs"].notna()]
    if skip_input:
        first = np.zeros(len(rows), bool)
        for run in _rows_by_run(rows):
            names = rows["layer"].to_numpy(object)[run]
            first[run] = names == names[0]
        rows = rows.loc[~first]
    if layers is not None:
        rows = rows.loc[rows["layer"].isin(list(layers))]
    rows = rows.loc[rows["cos_gradient"].notna()]
    need(rows, [], "the gradient gap of these layers")
    return rows.assign(degrees=np.degrees(np.arccos(rows["cos_gradient"].clip(-1, 1))))


def need(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    if missing := [name for name in columns if name not in table]:
        hint = (
            "; a log's own table gets it with table.assign(...)"
            if missing[0] in ("activation", "seed", "run")
            else ""
        )
        raise ValueError(f"{what} needs a column '{missing[0]}', which the table lacks{hint}")
    if len(table) == 0:
        raise ValueError(
            f"{what} needs rows, and the table has none: were these quantities measured, or "
            "filtered away?"
        )


def _of_run(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    return [
        name
        for name in ("run", "seed")
        if name in table and name not in keys and len(table[name].dropna()) == len(table)
    ]


def _rows_by_run(table: pd.DataFrame) -> list:
    """Row positions of each run; a table without `run` is one run."""
    import numpy as np

    if "run" not in table:
        return [np.arange(len(table))]
    return list(table.groupby("run", observed=True, sort=False).indices.values())
