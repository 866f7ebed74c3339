"""Reductions of the tidy table, from table to table: print one to see what a picture shows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biasshift.analysis.quantities import gap_degrees


def with_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with an `epoch` in every row, interpolated over the steps of its run.

    Only the rows of the whole network carry an epoch. Step 0 is epoch 0, and behind the last epoch
    of a run its average pace goes on. Without a column `run`, the table is one run.

    Raises:
        ValueError: there is no column `step` or `epoch`, or a run has no epochs.

    >>> steps = pd.DataFrame({"step": [0, 5, 10, 15], "epoch": [None, None, 1.0, None]})
    >>> with_epochs(steps)["epoch"].tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
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
        raise ValueError("A run of this table has no rows with an epoch. Draw it against='step'.")
    return table.assign(epoch=epoch)


def median_over_units(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns the median of a column over all units of all layers of a run.

    One row per run and combination of `keys`, with the columns `run` and `seed` where the table
    has them in every row. Rows of whole layers or networks (`unit` −1) do not count.

    Raises:
        ValueError: the table is empty or lacks a column, or no unit has a value.
    """
    need(table, ["unit", column, *keys], f"the median of '{column}'")
    units = table.loc[(table["unit"] >= 0) & table[column].notna()]
    need(units, [], f"the median of '{column}' over units")
    run = [name for name in _complete(units, ["run", "seed"]) if name not in keys]
    medians = units.groupby([*keys, *run], observed=True, sort=True)[column].median()
    return medians.reset_index()


def mean_and_sd_over_seeds(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns `mean` and standard deviation `sd` of a column, and `n`, the number of runs.

    One row per combination of `keys`. The standard deviation is that with n − 1, and NaN for a
    single run.

    Raises:
        ValueError: there is nothing to average, or a seed comes twice: then runs of different
            settings would be averaged.
    """
    need(table, [column, *keys], f"the mean of '{column}'")
    rows = table.loc[table[column].notna()]
    need(rows, [], f"the mean of '{column}'")
    run = _complete(rows, ["seed", "run"])[:1]
    twice = rows.loc[rows.duplicated([*keys, *run])]
    if len(twice):
        where = ", ".join(f"{key} = {twice.iloc[0][key]}" for key in [*keys, *run])
        raise ValueError(
            f"Two values of '{column}' would be averaged at {where}. Keep runs of one setting, and "
            "one row per run and step."
        )
    values = rows.groupby(list(keys), observed=True, sort=True)[column]
    return values.agg(mean="mean", sd="std", n="size").reset_index()


def median_over_runs(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns the median of a column over runs, under the name `mean`, and `n`, the runs.

    It has the form of `mean_and_sd_over_seeds`, with NaN for `sd`, so that the same lines can be
    drawn of it, without a ribbon.

    Raises:
        ValueError: as `mean_and_sd_over_seeds`.
    """
    means = mean_and_sd_over_seeds(table, column, keys)
    rows = table.loc[table[column].notna()]
    medians = rows.groupby(list(keys), observed=True, sort=True)[column].median().to_numpy()
    return means.assign(mean=medians, sd=float("nan"))


def gap_points(
    table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False
) -> pd.DataFrame:
    """Returns the gradient gap of every layer: one row per run, layer and step.

    `degrees` is the angle between the gradient and the unit natural gradient of the layer, and
    `mean_in_abs` the mean over its inputs of |E_p(a)|. A cosine that was rounded past 1 is an angle
    of 0.

    Args:
        layers: keep only these.
        skip_input: leave out the first layer of each run, whose incoming activations are the data.

    Raises:
        ValueError: the table is empty or lacks a column, or nothing is left of it.
    """
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
    return rows.assign(degrees=gap_degrees(rows["cos_gradient"]))


def need(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raises an error that names the remedy, unless the table has these columns and some rows.

    Args:
        what: what is made of the table, for the message: "the gradient gap".

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    if missing := [name for name in columns if name not in table]:
        remedy = (
            "Add it with table.assign(...), for a log's own table has none"
            if missing[0] in ("activation", "seed", "run")
            else "Give runs that recorded it"
        )
        raise ValueError(f"The table lacks the column '{missing[0]}', needed for {what}. {remedy}.")
    if len(table) == 0:
        raise ValueError(
            f"The table has no rows for {what}. Measure these quantities, or filter less."
        )


def _complete(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of the columns that have a value in every row."""
    return [name for name in names if name in table and len(table[name].dropna()) == len(table)]


def _rows_by_run(table: pd.DataFrame) -> list:
    """Row positions of each run; a table without `run` is one run."""
    if "run" not in table:
        return [np.arange(len(table))]
    return list(table.groupby("run", observed=True, sort=False).indices.values())
