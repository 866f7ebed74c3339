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
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from biasshift.layout import LAYOUT, OURS, TEMPORARY, check_config, conform, first_line, is_run

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

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
        >>> from biasshift.reading import read_run
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
        check_config(config)
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
            self._waiting.append(conform(pa.Table.from_pandas(frame, preserve_index=False)))
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"the run '{self.folder}' cannot store these rows: {first_line(error)}") from error
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
    if not all(TEMPORARY.fullmatch(name) for name in names):
        try:
            ours = is_run(folder)
        except ValueError:
            ours = False
        if not ours:
            raise FileExistsError(f"'{folder}' is not empty and holds no run: choose another folder (--out)")
        if exist == "refuse":
            raise FileExistsError(
                f"'{folder}' already holds a run: choose another folder (--out), or delete that run with exist=\"replace\""
            )
    for name in names:
        if OURS.fullmatch(name) or TEMPORARY.fullmatch(name):
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
