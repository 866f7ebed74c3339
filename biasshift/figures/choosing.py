"""Which of the given runs a figure is about, what is kept of their settings, and what the figure says about them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from biasshift.layout import read_json
from biasshift.reading import find_runs, read_runs

if TYPE_CHECKING:
    import pandas as pd

OURS = ("digits", "mnist", "autoencoder", "cifar11", "cifar18", "imagenet", "sweep")
RUN_COLUMNS = (
    "run", "experiment", "dataset", "activation", "seed", "epochs", "steps", "batch_size", "lr", "depth", "width", "batch_norm",
    "update", "constant", "device", "made", "reached", "last_step",
)  # fmt: skip
MADE = {"smoke": "Smoke run: a tiny version, which shows only that it works.", "quick": "Quick version, which decides nothing."}


def read(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of `read_runs` with each run's `device`, and whether it was `made` by --quick or --smoke."""
    import numpy as np
    import pandas as pd

    table, folders = read_runs(*paths), find_runs(paths)
    origins = [read_json(folder, "provenance.json", {}) for folder in folders]
    which = table["run"].cat.codes.to_numpy()
    made = [next((name for name in MADE if f"--{name}" in words(origin)), "") for origin in origins]
    devices = [str(origin.get("device") or "unknown device")[:60] for origin in origins]
    for name, values in (("device", devices), ("made", made)):
        if name not in table:
            table[name] = pd.Categorical(np.array(values, dtype=object)[which])
    return table


def words(origin: Mapping[str, Any]) -> list[str]:
    """The command line that a run was made with."""
    command = origin.get("command")
    return [str(word) for word in command] if isinstance(command, list) else []


def chosen(table: pd.DataFrame, experiments: Sequence[str], prefer: Mapping[str, object], remedy: str) -> pd.DataFrame:
    """The rows of the first of `experiments` that is there, of its preferred setting where it has such runs.

    Somebody's own runs, of an experiment that is none of ours, are taken as they are.

    Raises:
        ValueError: all runs are of our other experiments.
    """
    if "experiment" in table:
        there = [str(name) for name in table["experiment"].dropna().unique()]
        wanted = [name for name in experiments if name in there][:1] or [name for name in there if name not in OURS]
        if there and not wanted:
            raise ValueError(f"These runs are of {', '.join(sorted(there))}; this figure shows others: {remedy}")
        if there:
            table = table.loc[table["experiment"].isin(wanted)]
    for name, value in prefer.items():
        like = table[name] == value if name in table else None
        table = table if like is None or not like.any() else table.loc[like]
    return table


def with_length(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the last epoch and step that each run got to."""
    if "run" not in table:
        return table
    runs = table.groupby("run", observed=True)
    found = {"last_step": runs["step"].max()} | ({"reached": runs["epoch"].max()} if "epoch" in table else {})
    return table.assign(**{name: table["run"].astype(object).map(values).astype(float) for name, values in found.items()})


def kept(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows with the given columns and those of their runs."""
    names = ["step", "layer", "unit", *columns, *(name for name in RUN_COLUMNS if name in rows)]
    return rows[[name for name in dict.fromkeys(names) if name in rows]].reset_index(drop=True)


def with_settings(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows that know their run, and nothing else of it, with the run's columns."""
    settings = table.drop_duplicates("run")[[name for name in RUN_COLUMNS if name in table]]
    return rows.astype({"run": object}).merge(settings.astype({"run": object}), on="run", how="left")


def described(table: pd.DataFrame) -> str:
    """Which runs a figure shows, as far as they say it: "digits: 60 epochs, 6 seeds, cpu (x86_64)"."""
    kinds = [_listed(table, "experiment"), _listed(table, "dataset"), _shape(table), _unusual(table)]
    seeds = table["seed"].nunique() if "seed" in table else 0
    facts = [_length(table), f"{seeds} seed{'s' if seeds > 1 else ''}" if seeds else "", _listed(table, "device")]
    what, rest = ", ".join(filter(None, kinds)), ", ".join(filter(None, facts))
    made = [MADE[name] for name in MADE if "made" in table and (table["made"] == name).any()]
    return " ".join([*made, ": ".join(filter(None, [what, rest]))])


def _listed(table: pd.DataFrame, name: str) -> str:
    return ", ".join(sorted(map(str, table[name].dropna().unique()))) if name in table else ""


def _shape(table: pd.DataFrame) -> str:
    """ "8 × 128": layers and units of fully connected networks."""
    if not {"depth", "width"} <= set(table):
        return ""
    shapes = table[["depth", "width"]].dropna().drop_duplicates()
    return ", ".join(f"{depth:g} × {width:g}" for depth, width in shapes.itertuples(index=False))


def _unusual(table: pd.DataFrame) -> str:
    """What the reader would not expect of all of these networks."""
    scales = sorted(table["width"].dropna().unique()) if "width" in table and "depth" not in table else []
    scaled = f"units × {' and '.join(f'{scale:g}' for scale in scales)}" if scales and scales != [1] else ""
    normed = "batch_norm" in table and bool((table["batch_norm"] == True).all()) and len(table) > 0  # noqa: E712
    updates = sorted(map(str, table["update"].dropna().unique())) if "update" in table else []
    other = f"{updates[0]} update" if len(updates) == 1 and updates != ["plain"] else ""
    return ", ".join(filter(None, [scaled, "with batch norm" if normed else "", other]))


def _length(table: pd.DataFrame) -> str:
    """What the runs were meant to be, and how far they got if that is less."""
    by_steps = "steps" in table and table["steps"].notna().any()
    planned, got, unit = ("steps", "last_step", "steps") if by_steps else ("epochs", "reached", "epochs")
    if planned not in table or not table[planned].notna().any():
        return ""
    whole = _range(table[planned])
    if got in table and (table[got] < table[planned] - 1e-6).any():
        return f"{_range(table[got])} of {whole} {unit} (some ended early)"
    return f"{whole} {unit}"


def _range(values: pd.Series) -> str:
    known = values.dropna()
    return "–".join(f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in sorted({known.min(), known.max()}))
