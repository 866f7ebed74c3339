"""Which of the given runs a figure is about, and what is kept of their settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from biasshift.analysis.per_run import SHARED
from biasshift.figures.captions import MADE
from biasshift.runs.provenance import words
from biasshift.runs.reader import find_runs, read_runs
from biasshift.runs.schema import read_config, read_json

if TYPE_CHECKING:
    import pandas as pd

OURS = ("digits", "mnist", "autoencoder", "cifar11", "cifar18", "imagenet", "sweep")
RUN_COLUMNS = (
    "run", "experiment", "dataset", "activation", "seed", "epochs", "steps", "batch_size", "lr", "depth", "width", "batch_norm",
    "update", "constant", "update_every", "test_images", "valid_images", "device", "made", "reached", "last_step",
)  # fmt: skip


# Options that no figure shows the effect of: what examinations at equal loss look at, and which
# runs have one.
UNSHOWN = (
    "run",
    "activation",
    "seed",
    "device",
    "made",
    "reached",
    "last_step",
    "examined",
    "exam_size",
    "equal_loss",
)


# Those of measurements along the run, which curves of losses and errors do not depend on.
MEASURED = (
    "probe_size",
    "means_every",
    "fisher_every",
    "every",
    "units_measured",
    "damping",
    "skip_input_layer",
)


def read(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of `read_runs` with each run's `device`, and whether it was `made` by
    --quick or --smoke.

    Its `attrs` say which columns are options of the runs.
    """
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
    table.attrs["options"] = list(
        dict.fromkeys(name for folder in folders for name in read_config(folder) if name in table)
    )
    return table


def chosen(
    table: pd.DataFrame, experiments: Sequence[str], prefer: Mapping[str, object], remedy: str
) -> pd.DataFrame:
    """The rows of the first of `experiments` that is there, of its preferred setting where it has
    such runs.

    Somebody's own runs, of an experiment that is none of ours, are taken as they are. The `attrs`
    say what was left out.

    Raises:
        ValueError: all runs are of our other experiments.
    """
    left = []
    if "experiment" in table:
        there = [str(name) for name in table["experiment"].dropna().unique()]
        wanted = [name for name in experiments if name in there][:1] or [
            name for name in there if name not in OURS
        ]
        if there and not wanted:
            raise ValueError(
                f"These runs are of {', '.join(sorted(there))}; this figure shows others: {remedy}"
            )
        if there:
            left = [
                f"{_runs(table.loc[table['experiment'] == name])} of {name}"
                for name in there
                if name not in wanted
            ]
            table = table.loc[table["experiment"].isin(wanted)]
    for name, value in prefer.items():
        like = table[name] == value if name in table else None
        if like is not None and like.any() and not like.all():
            left.append(f"{_runs(table.loc[~like])} with another {name} than {value}")
            table = table.loc[like]
    if left:
        table.attrs["left_out"] = left
    return table


def _runs(table: pd.DataFrame) -> str:
    count = table["run"].nunique() if "run" in table else len(table)
    return f"{count} run{'s' if count != 1 else ''}"


def refuse_mixture(
    table: pd.DataFrame, name: str, apart: Sequence[str], unshown: Sequence[str] = ()
) -> None:
    """Refuses runs that differ in what a figure does not tell apart, and would be taken for seeds
    of one setting.

    Args:
        apart: the options that the figure tells apart, besides activation and seed.
        unshown: those that what it shows does not depend on.

    Raises:
        ValueError: the sentence names the option, or two runs of one setting and seed.
    """
    runs = table.drop_duplicates("run")
    updates = [option for option in runs if str(option).startswith("update_")]
    for option in dict.fromkeys([*RUN_COLUMNS, *SHARED, *updates, *table.attrs.get("options", ())]):
        if option in runs and option not in {*UNSHOWN, *apart, *unshown}:
            values = sorted(
                runs[option].dropna().astype(object).unique(),
                key=lambda value: (isinstance(value, str), value),
            )
            if len(values) > 1:
                said = ", ".join(
                    f"{value:g}" if isinstance(value, float) else str(value) for value in values
                )
                raise ValueError(
                    f"Figure {name} would take runs that differ in '{option}' ({said}) for one: "
                    "give runs of one setting."
                )
    keys = [option for option in ("activation", "seed", *apart) if option in runs]
    twice = (
        runs.loc[runs.duplicated(keys, keep=False) & runs["seed"].notna(), "run"]
        if {"activation", "seed"} <= set(runs)
        else []
    )
    if len(twice):
        raise ValueError(
            f"Figure {name} would take the runs {', '.join(map(str, twice[:2]))} of one seed for "
            "two: give one of them."
        )


def with_length(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the last epoch and step that each run got to."""
    if "run" not in table:
        return table
    runs = table.groupby("run", observed=True)
    found = {"last_step": runs["step"].max()} | (
        {"reached": runs["epoch"].max()} if "epoch" in table else {}
    )
    return table.assign(
        **{
            name: table["run"].astype(object).map(values).astype(float)
            for name, values in found.items()
        }
    )


def kept(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows with the given columns and those of their runs."""
    names = ["step", "layer", "unit", *columns, *(name for name in RUN_COLUMNS if name in rows)]
    return rows[[name for name in dict.fromkeys(names) if name in rows]].reset_index(drop=True)


def with_settings(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows that know their run, and nothing else of it, with the run's columns."""
    settings = table.drop_duplicates("run")[[name for name in RUN_COLUMNS if name in table]]
    return rows.astype({"run": object}).merge(
        settings.astype({"run": object}), on="run", how="left"
    )
