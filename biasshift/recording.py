"""A run is a folder: what was asked for, where it came from, and what was measured.

    config.json             the typed options, and the version of this layout
    provenance.json         command line, commit or version, library versions, device, seed, start
    state.json              running / finished / interrupted / failed, and the last step on disk
    segment-00000.parquet   rows (step, layer, unit); one segment per flush

Every file is written under a temporary name, synced and renamed. A run killed at any point is
therefore readable up to its last flush; its state stays "running".
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

LAYOUT = 1
STATES = ("running", "finished", "interrupted", "failed")
KEYS = ("step", "layer", "unit")  # stored as int64, text, int32
# Stored as float32: well-scaled quantities, for which seven digits are plenty. All other columns are float64:
# losses differ late in their digits, 1 - coupling may be 1e-8, and c, s and k0 may leave float32's range.
FLOAT32 = frozenset(
    "mean var total own incoming second_order k effective_samples norm_mean_p norm_mean_q norm_corrected_mean "
    "cos_gradient cos_centered cos_diagonal norm_ratio mean_in_abs".split()
)
FLOAT64 = frozenset("mean_delta2 s k0 coupling epoch train_loss valid_loss valid_error".split())
RESERVED = FLOAT32 | FLOAT64 | {*KEYS, "run", "state", "last_step", "started", "updated"}

_SEGMENT = re.compile(r"segment-(\d{5,})\.parquet")
_OURS = re.compile(r"segment-\d{5,}\.parquet|(config|provenance|state)\.json")
_TEMPORARY = re.compile(rf"\.({_OURS.pattern})\.tmp")
_MAX_JSON_BYTES = 10_000_000
_DEPTH = 3  # how far below a folder its runs may lie


# -- writing -----------------------------------------------------------------------------------------------------


class Run:
    """A run being written. Make one with `Run.create` and use it in a `with` block."""

    def __init__(self, folder: Path, config: Mapping[str, Any], max_rows: int):
        self.folder = folder
        self.last_step: int | None = None
        self._given = {"run", *config}
        self._max_rows = max_rows
        self._waiting: list[pa.Table] = []
        self._segments = 0
        self._closed = False

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        config: Any,
        exist: Literal["refuse", "replace"] = "refuse",
        *,
        device: Any = "cpu",
        max_rows: int = 200_000,
    ) -> Run:
        """Returns a new run in `folder`, its config and provenance already on disk.

        Args:
            config: a mapping or dataclass of JSON values (and paths). Its scalars become columns of the table.
            exist: "replace" deletes the files of a run that is already there, and nothing else.
            device: what the run computes on, for the provenance.
            max_rows: appended rows that may wait in memory; beyond that they are flushed.

        Raises:
            FileExistsError: the folder holds a run and `exist` is "refuse", or it holds files of something else.
            ValueError: the config cannot be stored, or one of its keys is a column of the table.

        >>> import pandas as pd, tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with Run.create(f"{out}/elu-0", {"activation": "elu", "seed": 0}) as run:
        ...         run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.3, 2.1]}))
        ...     read_run(f"{out}/elu-0")[["step", "train_loss", "run", "activation"]]
           step  train_loss    run activation
        0     0         2.3  elu-0        elu
        1     1         2.1  elu-0        elu
        """
        if exist not in ("refuse", "replace"):
            raise ValueError(f'exist is "refuse" or "replace", not {exist!r}')
        folder = Path(folder)
        config = dict(config) if isinstance(config, Mapping) else asdict(config)
        _check_config(config)
        _to_json(config)
        provenance = _provenance(config, device)
        _make_room(folder, exist)
        # The config comes first: from here on the folder is a run, whatever happens.
        _write_json(folder / "config.json", {"biasshift_run": LAYOUT, "config": config})
        _write_json(folder / "provenance.json", provenance)
        run = cls(folder, config, max_rows)
        run._write_state("running")
        return run

    def append(self, frame: pd.DataFrame) -> None:
        """Adds rows to the run; they wait in memory for the next flush.

        Args:
            frame: needs `step`. Without `layer` and `unit`, its rows are about the whole network: "" and -1.

        Raises:
            ValueError: a column has the wrong type or is already given by the config, or the run is closed.
        """
        import pyarrow as pa

        if self._closed:
            raise ValueError(f"the run '{self.folder}' is closed: append inside its `with` block")
        if len(frame) == 0:
            return
        if both := sorted(self._given.intersection(frame.columns)):
            raise ValueError(f"column '{both[0]}' is a column of the run '{self.folder}' already: drop it from the rows")
        frame = frame.assign(**{name: value for name, value in (("layer", ""), ("unit", -1)) if name not in frame})
        try:
            self._waiting.append(_conform(pa.Table.from_pandas(frame, preserve_index=False)))
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"the run '{self.folder}' cannot store these rows: {_first_line(error)}") from error
        if sum(len(table) for table in self._waiting) > self._max_rows:
            self.flush()

    def flush(self) -> None:
        """Puts the waiting rows on disk as one segment. A kill after this loses none of them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pa.concat_tables(self._waiting, promote_options="default").unify_dictionaries() if self._waiting else None
        if rows is not None:
            path = self.folder / f"segment-{self._segments:05d}.parquet"
            _write(path, lambda temporary: pq.write_table(rows, temporary, compression="zstd"))
            self._segments += 1
            last = int(rows["step"].to_numpy().max())
            self.last_step = last if self.last_step is None else max(self.last_step, last)
        self._waiting = []
        self._write_state("running")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        state = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        try:
            self.flush()
        except BaseException:
            state = "failed"
            raise
        finally:
            self._closed = True
            self._write_state(state)

    def _write_state(self, state: str) -> None:
        _write_json(self.folder / "state.json", {"state": state, "last_step": self.last_step, "updated": _now()})


def _make_room(folder: Path, exist: str) -> None:
    """Creates the folder, or empties it of an earlier run; never touches a file that no run writes."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file: choose another folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(os.listdir(folder), reverse=True)  # config.json after the segments: half deleted is still a run
    if not all(_TEMPORARY.fullmatch(name) for name in names):
        try:
            is_run = _is_run(folder)
        except ValueError:
            is_run = False
        if not is_run:
            raise FileExistsError(f"'{folder}' is not empty and holds no run: choose another folder (--out)")
        if exist == "refuse":
            raise FileExistsError(
                f"'{folder}' already holds a run: choose another folder (--out), or delete that run with exist=\"replace\""
            )
    for name in names:
        if _OURS.fullmatch(name) or _TEMPORARY.fullmatch(name):
            (folder / name).unlink()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # before the rename, or a power cut may leave the name on an empty file
    os.replace(temporary, path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = _to_json(value)
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _to_json(value: Mapping[str, Any]) -> str:
    def plain(item: object) -> str:
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        raise TypeError(f"{item!r} is a {type(item).__name__}")

    try:
        return json.dumps(value, indent=2, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of a run holds numbers, text, lists and dicts, finite all: {error}") from error


def _check_config(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if not isinstance(key, str) or key in RESERVED:
            raise ValueError(f"config key {key!r} is no text or is a column of the table already: rename the option")
        if isinstance(value, int) and not _fits(value):
            raise ValueError(f"config key '{key}' holds {value}, which needs more than 64 bits: choose a smaller number")


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


# -- provenance --------------------------------------------------------------------------------------------------


def _provenance(config: Mapping[str, Any], device: Any) -> dict[str, Any]:
    import torch

    on_gpu = str(device).startswith("cuda")
    return {
        "command": sys.argv,
        **_code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device} ({platform.machine()})",
        "seed": config.get("seed"),
        "started": _now(),
    }


def _code_version() -> dict[str, Any]:
    """Commit and dirty flag when the package runs from its own checkout, its version otherwise."""
    from importlib import metadata

    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        # No optional locks: looking at a checkout must not disturb somebody's git command in it.
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie below another project's checkout, whose commit says nothing about it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return {"version": metadata.version("biasshift")}
    except metadata.PackageNotFoundError:
        return {"version": None}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# -- reading -----------------------------------------------------------------------------------------------------
# A run may come from anywhere: nothing that is read here can execute, and every defect is one ValueError.


def read_run(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of one run folder; see `read_runs`."""
    if not _is_run(Path(folder)):
        raise ValueError(f"'{folder}' holds no run: pass the folder that contains its config.json, or use read_runs")
    return read_runs(folder)


def read_runs(*paths: str | os.PathLike[str], columns: Sequence[str] | None = None, units: bool = True) -> pd.DataFrame:
    """Returns the rows of all runs in or below `paths` as one tidy table, with the columns of each run.

    A run's columns are `run` (its folder's name, with as many parents as it takes to tell the runs apart)
    and the scalars of its config. Text is categorical; layers keep the order of the network. What one run
    lacks is NaN.

    Args:
        paths: run folders, or folders with runs at most three levels below.
        columns: keep only these, besides step, layer, unit and run: saves memory on hundreds of runs.
        units: False keeps only the rows of whole layers and networks (`unit` = -1).

    Raises:
        ValueError: a folder holds no run, a file is damaged or points out of its folder, or a column is in no run.
    """
    import numpy as np
    import pyarrow as pa

    folders = _find_runs(paths)
    tables = [_read_segments(folder, columns, units) for folder in folders]
    which = np.repeat(np.arange(len(folders)), [len(table) for table in tables])
    rows = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    del tables  # lets the conversion free each column once it is copied
    table = rows.to_pandas(split_blocks=True, self_destruct=True, ignore_metadata=True)
    for name, values in _run_columns(folders).items():
        if name in table:
            raise ValueError(f"column '{name}' is a config key of one run and measured in another: read them separately")
        if columns is None or name == "run" or name in columns:
            table[name] = values.take(which)
    if missing := [name for name in columns or () if name not in table]:
        raise ValueError(f"no run below {', '.join(map(str, paths))} has a column '{missing[0]}'")
    return table


def run_states(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns one row per run in or below `paths`: run, state, last_step, started, updated, and its config's scalars.

    A killed run is still "running": `updated`, the time of its last flush, then lies in the past.

    Raises:
        ValueError: as `read_runs`.
    """
    import pandas as pd

    folders = _find_runs(paths)
    states = [_read_json(folder, "state.json", {"state": "running"}) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        last = state.get("last_step")
        if state.get("state") not in STATES or not (last is None or (isinstance(last, int) and _fits(last))):
            raise ValueError(f"'{folder / 'state.json'}' tells no state and step: delete it, and the run counts as running")
    started = [_read_json(folder, "provenance.json", {}).get("started") for folder in folders]
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


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options that a run was made with."""
    folder = Path(folder)
    stored = _read_json(folder, "config.json")
    config = stored.get("config")
    if stored.get("biasshift_run") != LAYOUT or not isinstance(config, dict):
        raise ValueError(f"'{folder / 'config.json'}' is of another layout than {LAYOUT}: read it with the version that wrote it")
    try:
        _check_config(config)
    except ValueError as error:
        raise ValueError(f"'{folder / 'config.json'}': {error}") from error
    return config


def _find_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    found = {folder.resolve(): folder for path in paths for folder in _runs_below(Path(path), Path(path), _DEPTH)}
    if not found:
        raise ValueError(f"no runs in {', '.join(map(str, paths)) or 'no folder'}: a run is a folder whose config.json biasshift wrote")
    return list(found.values())


def _runs_below(folder: Path, top: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder: pass the folder of a run, or one that contains runs")
    if folder.is_symlink() and folder != top and not folder.resolve().is_relative_to(top.resolve()):
        raise ValueError(f"'{folder}' is a link out of '{top}': remove it, or pass its target by name")
    if _is_run(folder):
        yield folder
    elif depth:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith("."):
                yield from _runs_below(below, top, depth - 1)


def _is_run(folder: Path) -> bool:
    return "biasshift_run" in _read_json(folder, "config.json", {})


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"'{path}' is a link out of its run: replace it by the file itself")
    if not path.is_file():
        raise ValueError(f"'{path}' is missing or no ordinary file: restore it, or move the run out of the way")
    return path


def _read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not os.path.lexists(folder / name):
        return default
    path = _file(folder, name)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, infinity and lone surrogates
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is no readable JSON ({_first_line(error)}): restore it, or move the run out of the way") from error
    return value


def _read_segments(folder: Path, columns: Sequence[str] | None, units: bool) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbered = sorted((int(match[1]), match[0]) for match in map(_SEGMENT.fullmatch, os.listdir(folder)) if match)
    parts = [_read_segment(_file(folder, name), columns) for _, name in numbered]
    parts = parts if units else [part.filter(pc.field("unit") == -1) for part in parts]
    text = pa.dictionary(pa.int32(), pa.string())
    none = pa.schema([("step", pa.int64()), ("layer", text), ("unit", pa.int32())]).empty_table()
    return pa.concat_tables([none, *parts], promote_options="default")


def _read_segment(path: Path, columns: Sequence[str] | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, read_dictionary=["layer"]) as file:
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in {*KEYS, *columns}]
            return _conform(file.read(wanted))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"'{path}' is no readable segment ({_first_line(error)}): delete that file to read the rest of the run") from error


def _conform(table: pa.Table) -> pa.Table:
    """The same columns in the types of the layout; what is stored and what is read both pass through here."""
    import pyarrow as pa

    names = table.column_names
    if sorted(names) != sorted({*KEYS, *names}):
        raise ValueError("columns step, layer and unit must be there, and no column twice")
    return pa.table({name: _column(name, table[name]) for name in [*KEYS, *(name for name in names if name not in KEYS)]})


def _column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import types

    kind, text = column.type, name == "layer"
    if text:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        fits = types.is_string(kind) or types.is_large_string(kind)
        column = column.cast(pa.string()) if fits else column
    else:
        fits = types.is_integer(kind) or (types.is_floating(kind) and name not in KEYS)
    if not fits or (name in KEYS and column.null_count):
        expected = "text" if text else "whole numbers" if name in KEYS else "numbers"
        raise ValueError(f"column '{name}' holds {kind} ({column.null_count} gaps), expected {expected}")
    stored = {"step": pa.int64(), "unit": pa.int32()}.get(name, pa.float32() if name in FLOAT32 else pa.float64())
    return column.dictionary_encode() if text else column.cast(stored)


def _run_columns(folders: Sequence[Path]) -> dict[str, Any]:
    """One value per run for `run` and for every scalar of a config: numbers as numbers, the rest categorical."""
    import numpy as np
    import pandas as pd

    configs = [read_config(folder) for folder in folders]
    columns: dict[str, Any] = {"run": pd.Categorical.from_codes(range(len(folders)), categories=_run_names(folders))}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) if isinstance(config.get(key), bool | int | float | str) else None for config in configs]
        kinds = {type(value) for value in values}
        if kinds in ({int}, {bool}):
            columns[key] = np.array(values)
        elif kinds <= {int, float, type(None)} and kinds != {type(None)}:
            columns[key] = np.array([float("nan") if value is None else value for value in values], dtype=np.float64)
        elif kinds != {type(None)}:
            # Mixed values become text: 1 and True would be one category.
            columns[key] = pd.Categorical([None if value is None else str(value) for value in values])
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
    import pandas as pd

    texts = [stamp if isinstance(stamp, str) else None for stamp in stamps]
    return pd.to_datetime(texts, utc=True, errors="coerce", format="ISO8601")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
