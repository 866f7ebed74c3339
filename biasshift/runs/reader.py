"""Run folders → one tidy table. The files may come from anywhere: nothing in them is executed,
every defect is named.
"""

import os
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from biasshift.runs.schema import (
    KEYS,
    STATES,
    conform,
    first_line,
    fits,
    is_run,
    own_file,
    read_config,
    read_json,
    segment_files,
)

_DEPTH = 3  # how far below a folder its runs may lie
_TEXT = pa.dictionary(pa.int32(), pa.string())
# The table of a run without segments.
_NO_ROWS = pa.schema([("step", pa.int64()), ("layer", _TEXT), ("unit", pa.int32())]).empty_table()


def read_run(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of one run folder; see `read_runs`.

    Raises:
        ValueError: if the folder is not that of a run, or as `read_runs`.
    """
    if not is_run(Path(folder)):
        raise ValueError(
            f"'{folder}' is not a run folder. Pass the folder that contains the run's config.json, "
            "or use read_runs."
        )
    return read_runs(folder)


def read_runs(
    *paths: str | os.PathLike[str], columns: Sequence[str] | None = None, units: bool = True
) -> pd.DataFrame:
    """Returns the rows of all runs in or below `paths` as one tidy table.

    To what was measured it adds the columns of each run: `run` (its folder's name, with as many
    parents as it takes to tell the runs apart) and the scalars of its config. Text is categorical;
    layers keep the order of the network. What one run lacks is NaN.

    Args:
        paths: run folders, or folders with runs at most three levels below.
        columns: keep only these, besides step, layer, unit and run: saves memory on hundreds of
            runs.
        units: False keeps only the rows of whole layers and networks (`unit` = -1).

    Raises:
        ValueError: if a folder holds no run, a file is damaged or points out of its folder, or a
            column is in no run.
    """
    folders = find_runs(paths)
    tables = [_read_segments(folder, columns, units) for folder in folders]
    which = np.repeat(np.arange(len(folders)), [len(table) for table in tables])
    rows = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    del tables  # lets the conversion free each column once it is copied
    table = rows.to_pandas(split_blocks=True, self_destruct=True, ignore_metadata=True)
    for name, values in _run_columns(folders).items():
        if name in table:
            raise ValueError(
                f"Column '{name}' is a config key of one run and measured in another. Read these "
                "runs separately."
            )
        if columns is None or name == "run" or name in columns:
            table[name] = values.take(which)
    if missing := [name for name in columns or () if name not in table]:
        raise ValueError(
            f"No run in {', '.join(map(str, paths))} has a column '{missing[0]}'. Check the names "
            "in 'columns'."
        )
    return table


def run_states(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns one row per run in or below `paths`: how far it got, and its config's scalars.

    Columns `run`, `state`, `last_step`, `started` and `updated` come first. A killed run is still
    "running": `updated`, the time of its last flush, then lies in the past.

    Raises:
        ValueError: as `read_runs`.
    """
    folders = find_runs(paths)
    states = [read_json(folder, "state.json", {"state": "running"}) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        last = state.get("last_step")
        if state.get("state") not in STATES or not (
            last is None or (isinstance(last, int) and fits(last))
        ):
            raise ValueError(
                f"'{folder / 'state.json'}' must hold a state and a last step. Delete it, and the "
                "run counts as running."
            )
    started = [read_json(folder, "provenance.json", {}).get("started") for folder in folders]
    columns = _run_columns(folders)
    return pd.DataFrame(
        {
            "run": columns.pop("run"),
            "state": [state["state"] for state in states],
            "last_step": pd.array([state.get("last_step") for state in states], dtype="Int64"),
            "started": _times(started),
            "updated": _times([state.get("updated") for state in states]),
            **columns,
        }
    )


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Returns the run folders among the given ones and below them, each once.

    Raises:
        ValueError: if there is none, something is not a path, a path is not a directory, or a
            folder is a link out of them.
    """
    if others := [path for path in paths if not isinstance(path, str | os.PathLike)]:
        raise ValueError(f"Runs must be given as paths of folders, got {type(others[0]).__name__}.")
    folders = {
        folder.resolve(): folder
        for path in paths
        for folder in _runs_below(Path(path), Path(path), _DEPTH)
    }
    if not folders:
        raise ValueError(
            f"Found no runs in {', '.join(map(str, paths)) or 'an empty list of paths'}: a run is "
            "a folder whose config.json biasshift wrote."
        )
    return list(folders.values())


def _runs_below(folder: Path, top: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is not a directory. Pass the folder of a run, or one that contains runs."
        )
    if folder.is_symlink() and folder != top and not folder.resolve().is_relative_to(top.resolve()):
        raise ValueError(
            f"'{folder}' is a link out of '{top}'. Remove it, or pass its target by name."
        )
    if is_run(folder):
        yield folder
    elif depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _runs_below(below, top, depth - 1)


def _read_segments(folder: Path, columns: Sequence[str] | None, units: bool) -> pa.Table:
    parts = [_read_segment(own_file(folder, name), columns) for _, name in segment_files(folder)]
    parts = parts if units else [part.filter(pc.field("unit") == -1) for part in parts]
    return pa.concat_tables([_NO_ROWS, *parts], promote_options="default")


def _read_segment(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        with pq.ParquetFile(path, read_dictionary=["layer"]) as file:
            names = file.schema_arrow.names
            kept = None if columns is None else [n for n in names if n in {*KEYS, *columns}]
            return conform(file.read(kept))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is not a readable segment ({first_line(error)}). Delete that file to read "
            "the rest of the run."
        ) from error


def _run_columns(folders: Sequence[Path]) -> dict[str, Any]:
    """One value per run for `run` and for every scalar of a config: numbers as numbers, the rest
    categorical.
    """
    configs = [read_config(folder) for folder in folders]
    columns: dict[str, Any] = {
        "run": pd.Categorical.from_codes(range(len(folders)), categories=_run_names(folders))
    }
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [
            value if isinstance(value := config.get(key), bool | int | float | str) else None
            for config in configs
        ]
        kinds = {type(value) for value in values}
        if kinds in ({int}, {bool}):
            columns[key] = np.array(values)
        elif kinds <= {int, float, type(None)} and kinds != {type(None)}:
            numbers = [nan if value is None else value for value in values]
            columns[key] = np.array(numbers, dtype=np.float64)
        elif kinds != {type(None)}:
            # Mixed values become text: 1 and True would be one category.
            texts = [None if value is None else str(value) for value in values]
            columns[key] = pd.Categorical(texts)
    return columns


def _run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell all runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _times(stamps: Sequence[Any]) -> pd.DatetimeIndex:
    texts = [stamp if isinstance(stamp, str) else None for stamp in stamps]
    return pd.to_datetime(texts, utc=True, errors="coerce", format="ISO8601")
