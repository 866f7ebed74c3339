"""Writes a run: what was asked for, where it came from, and what was measured.

A run is a folder; `biasshift.runs.schema` lists its files. Every file is written under a temporary
name, synced and renamed. A run killed at any point is therefore readable up to its last flush; its
state stays "running".
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biasshift.atomic import replacing
from biasshift.runs.provenance import now, provenance
from biasshift.runs.schema import (
    LAYOUT,
    RUN_FILE,
    TEMPORARY_FILE,
    check_config,
    conform,
    first_line,
    is_run,
    read_config,
    read_json,
    segment_files,
)


class Run:
    """A run being written. Make it with `Run.create` or `Run.resume`; use it in a `with` block.

    Leaving the block writes the rows that wait and the run's last state: "finished", "interrupted"
    by Ctrl-C, or "failed".
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], max_rows: int):
        self.folder = folder
        self.last_step: int | None = None
        self.segments = 0  # on disk
        self.failed = False  # set by whoever finds that the rest of the rows will not come
        self._run_columns = {"run", *config}
        self._max_rows = max_rows
        self._waiting: list[pa.Table] = []
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
    ) -> "Run":
        """Returns a new run in `folder`, its config and provenance already on disk.

        Args:
            folder: is created where it is not there.
            config: a mapping or dataclass of JSON values (and paths). Its scalars become columns of
                the table.
            exist: "replace" deletes the files of a run that is already there, and nothing else.
            device: what the run computes on, for the provenance.
            max_rows: appended rows that may wait in memory; beyond that they are flushed.

        Raises:
            FileExistsError: if the folder holds a run and `exist` is "refuse", or it holds files
                of something else.
            ValueError: if the config cannot be stored, or one of its keys is a column of the table.

        >>> import pandas as pd, tempfile
        >>> from biasshift.runs.reader import read_run
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with Run.create(f"{out}/elu-0", {"activation": "elu", "seed": 0}) as run:
        ...         run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.3, 2.1]}))
        ...     read_run(f"{out}/elu-0")[["step", "train_loss", "run", "activation"]]
           step  train_loss    run activation
        0     0         2.3  elu-0        elu
        1     1         2.1  elu-0        elu
        """
        if exist not in ("refuse", "replace"):
            raise ValueError(f'\'exist\' must be "refuse" or "replace", got {exist!r}.')
        folder, config = Path(folder), _options(config)
        check_config(config)
        _to_json(config)
        origin = provenance(config, device)
        _make_room(folder, exist)
        # The config comes first: from here on the folder is a run, whatever happens.
        _write_json(folder / "config.json", {"biasshift_run": LAYOUT, "config": config})
        _write_json(folder / "provenance.json", origin)
        run = cls(folder, config, max_rows)
        run._write_state("running")
        return run

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        config: Any,
        segments: int,
        *,
        last_step: int | None = None,
        max_rows: int = 200_000,
    ) -> "Run":
        """Returns a run that is there already, to write on behind its first segments.

        Later segments are deleted, and its state becomes "running".

        Args:
            folder: the run's.
            config: must be the one that the run was made with.
            segments: how many to keep.
            last_step: the last one in those segments.
            max_rows: as in `create`.

        Raises:
            ValueError: if the run was made with another configuration, or lacks segments.

        >>> import pandas as pd, tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with Run.create(f"{out}/elu-0", {"seed": 0}) as run:
        ...         run.append(pd.DataFrame({"step": [0]}))
        ...     with Run.resume(f"{out}/elu-0", {"seed": 0}, segments=0) as run:
        ...         run.segments
        0
        """
        folder, config = Path(folder), _options(config)
        _require_same_config(folder, config)
        names = dict(segment_files(folder))
        if missing := set(range(segments)) - set(names):
            raise ValueError(
                f"'{folder}' has lost segment {min(missing)}. Give --replace to start it again."
            )
        for number in sorted(set(names) - set(range(segments)), reverse=True):
            (folder / names[number]).unlink()
        run = cls(folder, config, max_rows)
        run.segments, run.last_step = segments, last_step
        run._write_state("running")
        return run

    @staticmethod
    def is_finished(folder: str | os.PathLike[str], config: Any) -> bool:
        """Tells whether the folder holds the run of this config, complete.

        Raises:
            ValueError: if it holds a run of another configuration.
        """
        folder = Path(folder)
        if not (folder.is_dir() and is_run(folder)):
            return False
        _require_same_config(folder, _options(config))
        return read_json(folder, "state.json", {}).get("state") == "finished"

    def append(self, frame: pd.DataFrame) -> None:
        """Adds rows to the run; they wait in memory for the next flush.

        More than `max_rows` of them are flushed at once.

        Args:
            frame: needs `step`. Without `layer` and `unit`, its rows are about the whole network:
                "" and -1.

        Raises:
            ValueError: if a column has the wrong type or is a key of the config, or the run is
                closed.
        """
        if self._closed:
            raise ValueError(f"The run '{self.folder}' is closed. Append inside its `with` block.")
        if len(frame) == 0:
            return
        if both := sorted(self._run_columns.intersection(frame.columns)):
            raise ValueError(
                f"Column '{both[0]}' is a column of the run '{self.folder}' already. Drop it from "
                "the rows."
            )
        whole = {"layer": "", "unit": -1}
        frame = frame.assign(**{name: whole[name] for name in whole if name not in frame})
        try:
            self._waiting.append(conform(pa.Table.from_pandas(frame, preserve_index=False)))
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(
                f"The run '{self.folder}' cannot store these rows: {first_line(error)}."
            ) from error
        if sum(len(table) for table in self._waiting) > self._max_rows:
            self.flush()

    def flush(self) -> None:
        """Puts the waiting rows on disk as one segment. A kill after this loses none of them."""
        if self._waiting:
            rows = pa.concat_tables(self._waiting, promote_options="default").unify_dictionaries()
            path = self.folder / f"segment-{self.segments:05d}.parquet"
            with replacing(path) as temporary:
                pq.write_table(rows, temporary, compression="zstd")
            self.segments += 1
            last = int(rows["step"].to_numpy().max())
            self.last_step = last if self.last_step is None else max(self.last_step, last)
        self._waiting = []
        self._write_state("running")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        state = "failed" if kind or self.failed else "finished"
        if kind and issubclass(kind, KeyboardInterrupt):
            state = "interrupted"
        try:
            self.flush()
        except BaseException:
            state = "failed"
            raise
        finally:
            self._closed = True
            self._write_state(state)

    def _write_state(self, state: str) -> None:
        _write_json(
            self.folder / "state.json",
            {"state": state, "last_step": self.last_step, "updated": now()},
        )


def _options(config: Any) -> dict[Any, Any]:
    return dict(config) if isinstance(config, Mapping) else asdict(config)


def _require_same_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Compares what would be stored with what is."""
    stored, wanted = read_config(folder), json.loads(_to_json(config))
    for name in {**stored, **wanted}:
        if name not in stored:
            raise ValueError(
                f"'{folder}' holds a run of another version, which does not record {name}. Choose "
                "another folder (--out), or give --replace."
            )
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"'{folder}' holds a run with {name} = {stored.get(name)!r}, and this one has "
                f"{wanted.get(name)!r}. Choose another folder (--out), or give --replace."
            )


def _make_room(folder: Path, exist: str) -> None:
    """Creates the folder, or removes an earlier run; never touches a file that no run writes."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file. Choose another folder (--out).")
    folder.mkdir(parents=True, exist_ok=True)
    # The checkpoint goes first, config.json last: half deleted is still a run, and one that starts
    # from the beginning.
    names = sorted(
        os.listdir(folder),
        key=lambda name: ((name == "checkpoint.pt") - (name == "config.json"), name),
        reverse=True,
    )
    if not all(TEMPORARY_FILE.fullmatch(name) for name in names):
        try:
            ours = is_run(folder)
        except ValueError:
            ours = False
        if not ours:
            raise FileExistsError(
                f"'{folder}' is not empty and not a run folder. Choose another folder (--out)."
            )
        if exist == "refuse":
            raise FileExistsError(
                f"'{folder}' already holds a run. Choose another folder (--out), or replace that "
                'run (--replace, exist="replace").'
            )
    for name in names:
        if RUN_FILE.fullmatch(name) or TEMPORARY_FILE.fullmatch(name):
            (folder / name).unlink()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = _to_json(value)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _to_json(value: Mapping[str, Any]) -> str:
    def plain(item: object) -> str:
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        raise TypeError(f"{item!r} is of type {type(item).__name__}.")

    try:
        return json.dumps(value, indent=2, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "A config must hold numbers, text, lists and dicts, all finite, but "
            f"{first_line(error)}."
        ) from error
