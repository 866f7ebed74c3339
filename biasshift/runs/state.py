"""What a run folder says about itself, checked: its options, its origin, and how far it got.

state.json is written last, and lists the SHA-256 of everything else. What it lists is the run.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from biasshift.atomic import replacing
from biasshift.runs.integrity import digest, sealed
from biasshift.runs.schema import STATES, config_of, fits, parse_json, read_sealed

T = TypeVar("T")

ATTEMPTS = 20  # at reading a folder that somebody writes meanwhile


@dataclass(frozen=True)
class State:
    """What state.json holds.

    Args:
        state: "running", "finished", "interrupted" or "failed".
        last_step: The last one in the segments.
        updated: When the file was written.
        checked: Whether the run has checksums; without, the rest is empty.
        segments: SHA-256 of each, in the order of their numbers.
        checkpoints: SHA-256 of the checkpoints that the run may be resumed from, the latest last.
        together: Folders of the ensemble that this run has come to its end with; none before.
        diverged: Whether its training diverged, as far as that is known.
        config: Digest of what config.json holds.
        provenance: Digest of what provenance.json holds.
    """

    state: str = "running"
    last_step: int | None = None
    updated: str | None = None
    checked: bool = False
    segments: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    diverged: bool = False
    config: str = ""
    provenance: str = ""

    def stored(self) -> dict[str, Any]:
        """Returns the object that is written, with its digest."""
        return sealed(
            {
                "state": self.state,
                "last_step": self.last_step,
                "updated": self.updated,
                "config": self.config,
                "provenance": self.provenance,
                "checkpoints": list(self.checkpoints),
                "together": list(self.together),
                "diverged": self.diverged,
                "segments": list(self.segments),
            }
        )


@dataclass(frozen=True)
class Record:
    """A run folder but for its rows: options, origin and state, which belong together."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    state: State


def write_state(folder: Path, state: State) -> None:
    """Replaces state.json: this commits what it lists."""
    with replacing(folder / "state.json") as temporary:
        temporary.write_text(json.dumps(state.stored(), indent=2), encoding="utf-8")


def read_state(folder: Path) -> State:
    """Returns what state.json holds; of a run without checksums that has none, a running one's.

    Raises:
        ValueError: if the file is damaged, or missing though the run has had checksums, or has
            lost them.
    """
    path = folder / "state.json"
    value, checked = read_sealed(folder, path.name, {"state": "running"})
    last = value.get("last_step")
    if value.get("state") not in STATES or not (
        last is None or (isinstance(last, int) and fits(last))
    ):
        raise ValueError(
            f"'{path}' must hold a state and a last step. Restore it, or start the run anew with "
            "--replace."
        )
    updated = value.get("updated")
    state = State(value["state"], last, updated if isinstance(updated, str) else None)
    if checked:
        return _with_checksums(path, state, value)
    if set(parse_json(folder, "config.json", {})) - {"biasshift_run", "config"}:
        what = "has lost its checksums" if os.path.lexists(path) else "is missing"
        raise ValueError(
            f"'{path}' {what}. Restore it, or start the run anew with --replace: its other files "
            "are untouched."
        )
    return state


def _with_checksums(path: Path, state: State, value: Mapping[str, Any]) -> State:
    lists = {name: value.get(name) for name in ("segments", "checkpoints", "together")}
    texts = {name: value.get(name) for name in ("config", "provenance")}
    whole = all(isinstance(text, str) for text in texts.values()) and all(
        isinstance(items, list) and all(isinstance(item, str) for item in items)
        for items in lists.values()
    )
    if not whole:
        raise ValueError(f"'{path}' must list the checksums of a run. Restore it.")
    return replace(
        state,
        checked=True,
        diverged=value.get("diverged") is True,
        **{name: tuple(items or ()) for name, items in lists.items()},
        **texts,
    )


def read_record(folder: Path) -> Record:
    """Returns options, origin and state of a run.

    Raises:
        ValueError: if one of their files is damaged, missing, or another run's.
    """
    stored, _ = read_sealed(folder, "config.json")
    config = config_of(folder / "config.json", stored)
    state = read_state(folder)
    provenance, _ = read_sealed(folder, "provenance.json", {})
    for name, value, expected in (
        ("config.json", stored, state.config),
        ("provenance.json", provenance, state.provenance),
    ):
        if state.checked and digest(value) != expected:
            there = os.path.lexists(folder / name)
            raise ValueError(
                f"'{folder / name}' is "
                f"{'not the one that the run was made with' if there else 'missing'}. Restore it: "
                "the other files are untouched."
            )
    return Record(config, provenance, state)


def settled(folder: Path, read: Callable[[], T]) -> T:
    """Returns what a function reads from a run folder, between two of its writer's commits.

    Raises:
        ValueError: what the function raises, though nobody writes the run meanwhile.
    """
    for _ in range(ATTEMPTS):
        before = _versions(folder)
        try:
            return read()
        except (ValueError, OSError):
            if _versions(folder) == before:
                raise
        time.sleep(0.01)
    return read()


def _versions(folder: Path) -> list[tuple[int, int] | None]:
    return [_version(folder / name) for name in ("state.json", "config.json")]


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
