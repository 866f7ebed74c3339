"""Run folders → one tidy table. The files may come from anywhere: nothing in them is executed,
every defect is named.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biasshift.escapes import storable
from biasshift.runs.integrity import DamagedRunWarning, UncheckedRunWarning, file_digest
from biasshift.runs.limits import file_bytes, read_bounded, refuse_too_large
from biasshift.runs.schema import (
    KEYS,
    first_line,
    is_run,
    own_file,
    read_sealed,
    segment_files,
    segment_name,
)
from biasshift.runs.state import Record, State, read_record, settled

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
    *paths: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    units: bool = True,
    damaged: Literal["refuse", "skip"] = "refuse",
    absent: Literal["refuse", "skip"] = "refuse",
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
        absent: "skip" lets `columns` name what no run has.
        damaged: "skip" leaves out damaged and missing segments, with a `DamagedRunWarning`.

    Runs of version 0.1, which have no checksums, are read with a warning, `UncheckedRunWarning`.

    Raises:
        ValueError: if a folder holds no run, a file is damaged, missing or points out of its
            folder, or a column is in no run.
    """
    if damaged not in ("refuse", "skip"):
        raise ValueError(f'\'damaged\' must be "refuse" or "skip", got {damaged!r}.')
    folders = find_runs(paths)
    records, tables = [], []
    if units:
        refuse_too_large(folders, columns)
    for folder in folders:
        record, table = _read_settled(folder, columns, units, damaged)
        records.append(record)
        tables.append(table)
    _warn_unchecked(folders, records)
    which = np.repeat(np.arange(len(folders)), [len(table) for table in tables])
    rows = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    del tables  # lets the conversion free each column once it is copied
    table = rows.to_pandas(split_blocks=True, self_destruct=True, ignore_metadata=True)
    for name, values in _run_columns(folders, records).items():
        if name in table:
            raise ValueError(
                f"Column '{name}' is a config key of one run and measured in another. Read these "
                "runs separately."
            )
        if columns is None or name == "run" or name in columns:
            table[name] = values.take(which)
    missing = [name for name in columns or () if name not in table]
    if missing and absent == "refuse":
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
    records = [settled(folder, partial(read_record, folder)) for folder in folders]
    _warn_unchecked(folders, records)
    states = [record.state for record in records]
    columns = _run_columns(folders, records)
    return pd.DataFrame(
        {
            "run": columns.pop("run"),
            "state": [state.state for state in states],
            "last_step": pd.array([state.last_step for state in states], dtype="Int64"),
            "started": _times([record.provenance.get("started") for record in records]),
            "updated": _times([state.updated for state in states]),
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
        for folder in _runs_below(Path(path), Path(path), _DEPTH, {})
    }
    if not folders:
        raise ValueError(
            f"Found no runs in {', '.join(map(str, paths)) or 'an empty list of paths'}: a run is "
            "a folder whose config.json biasshift wrote."
        )
    return list(folders.values())


def _runs_below(folder: Path, top: Path, depth: int, entered: dict[Path, int]) -> Iterator[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is not a directory. Pass the folder of a run, or one that contains runs."
        )
    if folder.is_symlink() and folder != top and not folder.resolve().is_relative_to(top.resolve()):
        raise ValueError(
            f"'{folder}' is a link out of '{top}'. Remove it, or pass its target by name."
        )
    # Links may lead around in a circle: again only where it is looked into more deeply.
    if entered.get(folder.resolve(), -1) >= depth:
        return
    entered[folder.resolve()] = depth
    if is_run(folder):
        yield folder
        return
    _refuse_without_config(folder)
    if depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _runs_below(below, top, depth - 1, entered)


def _refuse_without_config(folder: Path) -> None:
    """Raises an error for a folder whose state.json says that it is a run with rows."""
    if not os.path.lexists(folder / "state.json"):
        return
    try:
        value, checked = read_sealed(folder, "state.json")
    except ValueError:  # anybody's
        return
    if checked and (value.get("segments") or value.get("state") != "running"):
        raise ValueError(
            f"'{folder / 'config.json'}' is missing. Restore it: the run's rows are untouched."
        )


def _read_settled(
    folder: Path, columns: Sequence[str] | None, units: bool, damaged: str
) -> tuple[Record, pa.Table]:
    return settled(folder, partial(_read_folder, folder, columns, units, damaged))


def _read_folder(
    folder: Path, columns: Sequence[str] | None, units: bool, damaged: str
) -> tuple[Record, pa.Table]:
    record = read_record(folder)
    parts = []
    for name, sha256 in _segments(folder, record.state):
        try:
            part = _read_segment(folder, name, sha256, columns, units)
        except ValueError as error:
            if damaged == "refuse":
                raise
            warnings.warn(DamagedRunWarning(f"Left out: {error}"), stacklevel=5)
            continue
        parts.append(part)
    return record, pa.concat_tables([_NO_ROWS, *parts], promote_options="default")


def _segments(folder: Path, state: State) -> list[tuple[str, str | None]]:
    """Names of the segments of a run, with their SHA-256 where it has checksums."""
    files = [name for _, name in segment_files(folder)]
    if not state.checked:
        return [(name, None) for name in files]
    listed = {segment_name(number): sha256 for number, sha256 in enumerate(state.segments)}
    # A kill leaves segments that are not part of the run yet, or no longer. Others are not ours.
    for name in files:
        if name not in listed:
            try:
                _read_segment(folder, name, None, KEYS, False)
            except ValueError:
                if os.path.lexists(folder / name):  # else its writer has removed it meanwhile
                    raise
    return list(listed.items())


def _read_segment(
    folder: Path, name: str, sha256: str | None, columns: Sequence[str] | None, units: bool
) -> pa.Table:
    if sha256 is not None and not os.path.lexists(folder / name):
        raise _lost(folder / name, "is missing")
    path = own_file(folder, name)
    with open(path, "rb") as content:
        if sha256 is not None and file_digest(content) != sha256:
            raise _lost(path, "is damaged: it is not what the run has written")
        try:
            with pq.ParquetFile(
                content, read_dictionary=["layer"], page_checksum_verification=True
            ) as file:
                return read_bounded(file, file_bytes(content), columns, units)
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise ValueError(
                f"'{path}' is not a readable segment ({first_line(error)}). Delete that file to "
                "read the rest of the run."
            ) from error


def _lost(path: Path, what: str) -> ValueError:
    return ValueError(
        f"'{path}' {what}. The rest can be read with damaged='skip'; give --replace to start the "
        "run again."
    )


def _warn_unchecked(folders: Sequence[Path], records: Sequence[Record]) -> None:
    old = [
        folder for folder, record in zip(folders, records, strict=True) if not record.state.checked
    ]
    if old:
        more = f" and {len(old) - 1} more" if len(old) > 1 else ""
        warnings.warn(
            UncheckedRunWarning(
                f"'{old[0]}'{more} may be damaged unseen: written without checksums, by version "
                "0.1."
            ),
            stacklevel=3,
        )


def _run_columns(folders: Sequence[Path], records: Sequence[Record]) -> dict[str, Any]:
    """One value per run for `run` and for every scalar of a config: numbers as numbers, the rest
    categorical.
    """
    configs = [record.config for record in records]
    columns: dict[str, Any] = {
        "run": pd.Categorical.from_codes(range(len(folders)), categories=run_names(folders))
    }
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [
            value if isinstance(value := config.get(key), bool | int | float | str) else None
            for config in configs
        ]
        kinds = {type(value) for value in values}
        if key == "activation" and kinds != {type(None)}:
            # A name, whatever it is: never a number.
            columns[key] = pd.Categorical([None if v is None else str(v) for v in values])
        elif kinds in ({int}, {bool}):
            columns[key] = np.array(values)
        elif kinds <= {int, float, type(None)} and kinds != {type(None)}:
            numbers = [nan if value is None else value for value in values]
            columns[key] = np.array(numbers, dtype=np.float64)
        elif kinds != {type(None)}:
            # Mixed values become text: 1 and True would be one category.
            texts = [None if value is None else str(value) for value in values]
            columns[key] = pd.Categorical(texts)
    return columns


def run_names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest tails of the paths that tell all runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [storable("/".join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _times(stamps: Sequence[Any]) -> pd.DatetimeIndex:
    texts = [stamp if isinstance(stamp, str) else None for stamp in stamps]
    return pd.to_datetime(texts, utc=True, errors="coerce", format="ISO8601")
