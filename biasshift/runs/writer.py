"""Writes a run: what was asked for, where it came from, and what was measured.

A run is a folder; `biasshift.runs.schema` lists its files. Every file is written under a temporary
name, synced and renamed, and state.json lists it only then. A run killed at any point is therefore
readable up to its last flush; its state stays "running".
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biasshift.atomic import replacing
from biasshift.runs.integrity import digest, file_digest, sealed
from biasshift.runs.options import options, require_same_config, to_json, write_json
from biasshift.runs.ownership import Ownership
from biasshift.runs.provenance import now, provenance
from biasshift.runs.resumption import segment_digests, with_checksums
from biasshift.runs.schema import (
    CHECKPOINT,
    LAYOUT,
    NEXT_CHECKPOINT,
    check_config,
    conform,
    first_line,
    is_run,
    read_sealed,
    segment_files,
    segment_name,
)
from biasshift.runs.space import make_room, refuse_occupied
from biasshift.runs.state import State, read_state, write_state


class Run:
    """A run being written. Make it with `Run.create` or `Run.resume`; use it in a `with` block.

    Leaving the block writes the rows that wait and the run's last state: "finished", "interrupted"
    by Ctrl-C, or "failed".
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        max_rows: int,
        owner: Ownership,
        state: State,
        owns: bool,
    ):
        self.folder = folder
        self.failed = False  # set by whoever finds that the rest of the rows will not come
        self.drops_checkpoint = False  # set by whoever has no use for it once the run has ended
        self._run_columns = {"run", *config}
        self._max_rows = max_rows
        self._waiting: list[pa.Table] = []
        self._closed = False
        self._owner, self._state, self._owns = owner, state, owns

    @property
    def segments(self) -> int:
        """The number of segments on disk."""
        return len(self._state.segments)

    @property
    def last_step(self) -> int | None:
        """The last step in the segments on disk."""
        return self._state.last_step

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        config: Any,
        exist: Literal["refuse", "replace"] = "refuse",
        *,
        device: Any = "cpu",
        max_rows: int = 200_000,
        owner: Ownership | None = None,
    ) -> "Run":
        """Returns a new run in `folder`, its config and provenance already on disk.

        Args:
            folder: is created where it is not there.
            config: a mapping or dataclass of JSON values (and paths). Its scalars become columns of
                the table.
            exist: "replace" deletes the files of a run that is already there, and nothing else.
            device: what the run computes on, for the provenance.
            max_rows: appended rows that may wait in memory; beyond that they are flushed.
            owner: the right to write the folder, where the caller has it and keeps it; else the run
                takes it, and gives it back at its end.

        Raises:
            FileExistsError: if the folder holds a run and `exist` is "refuse", it holds files of
                something else, or another process writes it.
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
        folder, config = Path(folder), options(config)
        check_config(config)
        to_json(config)
        origin = provenance(config, device)
        refuse_occupied(folder, exist)
        with _owning(folder, owner) as right:
            make_room(folder, exist)
            stored = {"biasshift_run": LAYOUT, "config": json.loads(to_json(config))}
            state = State(
                checked=True, config=digest(stored), provenance=digest(json.loads(to_json(origin)))
            )
            run = cls(folder, config, max_rows, right, state, owner is None)
            # The config comes last: it makes the folder a run, and all else is there by then.
            run._write_state("running")
            write_json(folder / "provenance.json", origin)
            write_json(folder / "config.json", sealed(stored))
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
        owner: Ownership | None = None,
        checkpoint: str | None = None,
        together: Sequence[str] = (),
    ) -> "Run":
        """Returns a run that is there already, to write on behind its first segments.

        Later segments are deleted, and its state becomes "running". A run of version 0.1 gets
        checksums.

        Args:
            folder: the run's.
            config: must be the one that the run was made with.
            segments: how many to keep.
            last_step: the last one in those segments.
            max_rows: as in `create`.
            owner: as in `create`.
            checkpoint: SHA-256 of the checkpoint that it is resumed from, if there is one.
            together: as in `end_together`, of a run that has nothing more to write.

        Raises:
            FileExistsError: if another process writes the run.
            ValueError: if the run was made with another configuration, lacks segments, or one of
                them or state.json is damaged.

        >>> import pandas as pd, tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with Run.create(f"{out}/elu-0", {"seed": 0}) as run:
        ...         run.append(pd.DataFrame({"step": [0]}))
        ...     with Run.resume(f"{out}/elu-0", {"seed": 0}, segments=0) as run:
        ...         run.segments
        0
        """
        folder = Path(folder)
        require_same_config(folder, config)
        config = options(config)
        with _owning(folder, owner) as right:
            before = read_state(folder)
            digests = segment_digests(folder, before, segments)
            state = replace(
                before if before.checked else with_checksums(folder),
                last_step=last_step,
                segments=digests,
                checkpoints=() if checkpoint is None else (checkpoint,),
                together=tuple(together),
            )
            run = cls(folder, config, max_rows, right, state, owner is None)
            # Before the files go: what it does not list is not missed.
            run._write_state("running")
            if not before.checked:
                stored, _ = read_sealed(folder, "config.json")
                write_json(folder / "config.json", sealed(stored))
            for number, name in segment_files(folder):
                if number >= segments:
                    (folder / name).unlink()
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
        require_same_config(folder, config)
        return read_state(folder).state == "finished"

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
        """Puts the waiting rows on disk as one segment. A kill after this loses none of them.

        Raises:
            ValueError: if the run is closed.
            RuntimeError: in a process that was forked from the one that the run was opened in.
        """
        if self._closed:
            raise ValueError(f"The run '{self.folder}' is closed. Flush inside its `with` block.")
        self._owner.require()
        if self._waiting:
            rows = pa.concat_tables(self._waiting, promote_options="default").unify_dictionaries()
            with replacing(self.folder / segment_name(self.segments)) as temporary:
                with open(temporary, "wb") as file:  # to pyarrow, names are UTF-8
                    pq.write_table(rows, file, compression="zstd", write_page_checksum=True)
                with open(temporary, "rb") as file:
                    sha256 = file_digest(file)
            last = int(rows["step"].to_numpy().max())
            written = replace(
                self._state,
                segments=(*self._state.segments, sha256),
                last_step=last if self.last_step is None else max(self.last_step, last),
            )
            # At once: an interruption between the two would write the rows again.
            self._state, self._waiting = written, []
        self._write_state("running")

    def announce_checkpoint(self, sha256: str) -> None:
        """Makes a checkpoint that lies in the folder one that the run may be resumed from.

        So may the one before, until the next one is announced.

        Args:
            sha256: of its file.
        """
        self._owner.require()
        self._state = replace(self._state, checkpoints=(*self._state.checkpoints[-1:], sha256))
        self._write_state("running")

    def end_together(self, members: Sequence[str]) -> None:
        """Records that all rows of this run are on disk, for its ensemble ends as one.

        Args:
            members: names of the folders of the ensemble.
        """
        self._owner.require()
        self._state = replace(self._state, together=tuple(members), diverged=self.failed)
        self._write_state("running")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if os.getpid() != self._owner.process:  # a fork that leaves its parent's block
            return
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
            self._close(state, drops_checkpoint=self.drops_checkpoint and kind is None)

    def _close(self, state: str, drops_checkpoint: bool) -> None:
        try:
            if drops_checkpoint:
                self._state = replace(self._state, checkpoints=())
            self._write_state(state)
            if drops_checkpoint:
                for name in (CHECKPOINT, NEXT_CHECKPOINT):
                    (self.folder / name).unlink(missing_ok=True)
        finally:
            if self._owns:
                self._owner.release()

    def _write_state(self, state: str) -> None:
        self._state = replace(self._state, state=state, updated=now())
        write_state(self.folder, self._state)


@contextmanager
def _owning(folder: Path, owner: Ownership | None) -> Iterator[Ownership]:
    """The right to write the folder, which is given back only where the block fails."""
    taken = Ownership(folder) if owner is None else owner
    try:
        yield taken
    except BaseException:
        if owner is None:
            taken.release()
        raise
