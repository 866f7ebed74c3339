"""The folder of a run that is to begin: free, or made free of an earlier run.

Killed at any moment, what is left reads as a run that has just begun, or is no run.
"""

import os
from pathlib import Path

from biasshift.atomic import sync_folder
from biasshift.runs.integrity import SEAL, digest
from biasshift.runs.schema import (
    LOCK,
    RUN_FILE,
    TEMPORARY_FILE,
    is_run,
    parse_json,
    read_sealed,
)
from biasshift.runs.state import State, write_state


def refuse_occupied(folder: Path, exist: str, owned: bool = False) -> None:
    """Creates the folder, and refuses one in which no run may begin.

    Args:
        folder: the run's.
        exist: "refuse" or "replace": what to do about a run that is there.
        owned: whether this process has the right to write the folder. If not, and another one seems
            to have it, nothing is refused: what is there may change at any moment.

    Raises:
        FileExistsError: if the folder holds a run and `exist` is "refuse", or files of something
            else.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"'{folder}' is a file. Choose another folder (--out).")
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in os.listdir(folder) if not _is_left_over(name)]
    if not names or _is_beginning(folder, names):
        return
    ours = _is_run(folder)
    if not owned and os.path.lexists(folder / LOCK):
        return
    if not ours:
        raise FileExistsError(
            f"'{folder}' is not empty and not a run folder. Choose another folder (--out)."
        )
    if exist == "refuse":
        raise FileExistsError(
            f"'{folder}' already holds a run. Choose another folder (--out), or replace that "
            'run (--replace, exist="replace").'
        )


def make_room(folder: Path, exist: str) -> None:
    """Removes an earlier run, and never a file that no run writes.

    Raises:
        FileExistsError: as `refuse_occupied`.
    """
    refuse_occupied(folder, exist, owned=True)
    if _is_run(folder) and not _is_empty(folder):
        # From here on the earlier run has neither rows nor a checkpoint.
        config, origin = (_digest(folder, name) for name in ("config.json", "provenance.json"))
        write_state(folder, State(checked=True, config=config, provenance=origin))
    # The checkpoint goes first, config.json last; state.json and provenance.json will be replaced.
    names = sorted(
        os.listdir(folder),
        key=lambda name: (name.startswith("checkpoint") - (name == "config.json"), name),
        reverse=True,
    )
    for name in names:
        kept = name in ("state.json", "provenance.json")
        if (RUN_FILE.fullmatch(name) and not kept) or TEMPORARY_FILE.fullmatch(name):
            (folder / name).unlink()
    sync_folder(folder)


def _is_left_over(name: str) -> bool:
    return name == LOCK or bool(TEMPORARY_FILE.fullmatch(name))


def _is_beginning(folder: Path, names: list[str]) -> bool:
    """Whether the files are those that a run writes before its config, which was not to come."""
    return set(names) <= {"state.json", "provenance.json"} and _is_empty(folder)


def _is_empty(folder: Path) -> bool:
    """Whether state.json says that a run has neither rows nor a checkpoint."""
    try:
        value, checked = read_sealed(folder, "state.json", {})
    except ValueError:
        return False
    return checked and value.get("segments") == [] == value.get("checkpoints")


def _is_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except ValueError:
        return False


def _digest(folder: Path, name: str) -> str:
    try:
        return digest({k: v for k, v in parse_json(folder, name, {}).items() if k != SEAL})
    except ValueError:  # it will be replaced
        return digest({})
