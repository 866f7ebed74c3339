"""Which of the given runs a figure is about, and what is kept of their settings."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from biasshift.analysis.grid import mixed_option
from biasshift.figures.captions import MADE
from biasshift.runs.provenance import command_line
from biasshift.runs.reader import find_runs, read_runs
from biasshift.runs.schema import read_config, read_json

OURS = ("digits", "mnist", "autoencoder", "cifar11", "cifar18", "imagenet", "sweep")
RUN_COLUMNS = tuple(
    "run experiment dataset activation seed epochs steps batch_size lr depth width batch_norm "
    "update constant update_every dropout schedule test_images valid_images device made reached "
    "last_step".split()
)
# Columns in which the runs of any figure may differ: what it shows or says of each run, and options
# of examinations at equal loss, which no figure shows.
ANY_VALUE = tuple(
    "run activation seed device made reached last_step examined exam_size equal_loss".split()
)
# Options of measurements along the run, which curves of losses and errors do not depend on.
MEASURED = tuple(
    "probe_size means_every fisher_every every units_measured damping skip_input_layer".split()
)


def read(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of `read_runs`, with the `device` of each run and how it was `made`.

    `made` is "quick" or "smoke" for runs of these options, else "". The table's attribute
    `attrs["options"]` lists the columns that are options of the runs.

    Args:
        paths: run folders, or folders that contain some.

    Raises:
        ValueError: there are no runs, or some cannot be read.
    """
    table, folders = read_runs(*paths), find_runs(paths)
    origins = [read_json(folder, "provenance.json", {}) for folder in folders]
    run_of_row = table["run"].cat.codes.to_numpy()
    made = [
        next((name for name in MADE if f"--{name}" in command_line(origin)), "")
        for origin in origins
    ]
    devices = [str(origin.get("device") or "unknown device")[:60] for origin in origins]
    for name, values in (("device", devices), ("made", made)):
        if name not in table:
            table[name] = pd.Categorical(np.array(values, dtype=object)[run_of_row])
    table.attrs["options"] = list(
        dict.fromkeys(name for folder in folders for name in read_config(folder) if name in table)
    )
    return table


def chosen(
    table: pd.DataFrame, experiments: Sequence[str], prefer: Mapping[str, object], remedy: str
) -> pd.DataFrame:
    """Returns the rows of the first of `experiments` that has runs, in its preferred setting.

    A preference is no condition: where no run has the preferred value of an option, all are kept.
    Somebody's own runs, of an experiment that is not one of `OURS`, are taken as they are. What was
    left out is listed in `attrs["left_out"]`, for the caption.

    Args:
        prefer: values of options.
        remedy: the end of the message, where there are no such runs.

    Raises:
        ValueError: all runs are of our other experiments.
    """
    left_out = []
    there = list(map(str, table["experiment"].dropna().unique())) if "experiment" in table else []
    if there:
        wanted = [name for name in experiments if name in there][:1] or [
            name for name in there if name not in OURS
        ]
        if not wanted:
            raise ValueError(
                f"These runs are of {', '.join(sorted(there))}, which this figure does "
                f"not show. {remedy}."
            )
        left_out = [
            f"{_count(table.loc[table['experiment'] == name])} of {name}"
            for name in there
            if name not in wanted
        ]
        table = table.loc[table["experiment"].isin(wanted)]
    for name, value in prefer.items():
        like = table[name] == value if name in table else None
        if like is not None and like.any() and not like.all():
            left_out.append(f"{_count(table.loc[~like])} with another {name} than {value}")
            table = table.loc[like]
    if left_out:
        table.attrs["left_out"] = left_out
    return table


def _count(table: pd.DataFrame) -> str:
    """ "3 runs"."""
    count = table["run"].nunique() if "run" in table else len(table)
    return f"{count} run{'s' if count != 1 else ''}"


def refuse_mixture(
    table: pd.DataFrame, name: str, compared: Sequence[str], irrelevant: Sequence[str] = ()
) -> None:
    """Raises an error if runs would be drawn as seeds of one setting, and are not.

    Args:
        name: the figure, for the message.
        compared: the options that the figure compares, besides activation and seed.
        irrelevant: those that what it shows does not depend on.

    Raises:
        ValueError: with the option and its values, or with two runs of one setting and seed.
    """
    ignored = (*ANY_VALUE, *compared, *irrelevant)
    if mixed := mixed_option(table, (*RUN_COLUMNS, *table.attrs.get("options", ())), ignored):
        values = ", ".join(
            f"{value:g}" if isinstance(value, float) else str(value) for value in mixed[1]
        )
        raise ValueError(
            f"Figure {name} would take runs that differ in '{mixed[0]}' ({values}) for seeds. "
            "Give runs of one setting."
        )
    runs = table.drop_duplicates("run")
    if {"activation", "seed"} <= set(runs):
        keys = [option for option in ("activation", "seed", *compared) if option in runs]
        twice = runs.duplicated(keys, keep=False) & runs["seed"].notna()
        if twice.any():
            names = ", ".join(map(str, runs.loc[twice, "run"][:2]))
            raise ValueError(
                f"Figure {name} would take the runs {names} of one seed for two. Give one of them."
            )


def with_length(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with the step and the epoch that each run got to.

    They are the columns `last_step` and, where there are epochs, `reached`.
    """
    by_run, run = table.groupby("run", observed=True), table["run"].astype(object)
    columns = {"last_step": "step", "reached": "epoch"}
    ends = {name: by_run[column].max() for name, column in columns.items() if column in table}
    return table.assign(**{name: run.map(end).astype(float) for name, end in ends.items()})


def kept(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Returns the rows with the given columns, and those that say where and of which run they are.

    The index is new. Columns that the rows lack are left out.
    """
    names = dict.fromkeys(["step", "layer", "unit", *columns, *RUN_COLUMNS])
    return rows[[name for name in names if name in rows]].reset_index(drop=True)


def with_settings(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Returns rows that know their run, and nothing else of it, with the run's columns.

    Args:
        rows: rows with a column `run`.
        table: the rows of these runs, with their settings.
    """
    settings = table.drop_duplicates("run")[[name for name in RUN_COLUMNS if name in table]]
    settings = settings.astype({"run": object})
    return rows.astype({"run": object}).merge(settings, on="run", how="left")
