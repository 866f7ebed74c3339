"""Where a training run stood: enough to resume it to the numbers of an uninterrupted run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from biasshift.atomic import replacing, sync_folder
from biasshift.distributed import is_distributed, rank, world_size
from biasshift.runs.integrity import file_digest
from biasshift.runs.schema import CHECKPOINT, NEXT_CHECKPOINT, own_file
from biasshift.runs.state import State

# -- the files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that lies in a run folder.

    Args:
        name: Of its file.
        sha256: Of its file.
        state: What it holds.
    """

    name: str
    sha256: str
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The completed steps."""
        return self.state["step"]

    @property
    def ensemble(self) -> list[str]:
        """The folders of the members that have a checkpoint of the same step, or were to get it."""
        names = self.state.get("ensemble")
        return [str(name) for name in names] if isinstance(names, list) else []


def prepare(folder: Path, state: Mapping[str, Any]) -> str:
    """Writes the next checkpoint of a run folder beside the present one, and returns its SHA-256.

    Args:
        folder: A run folder.
        state: Tensors, numbers, texts, and lists and dicts of them: what `found` accepts.
    """
    with replacing(folder / NEXT_CHECKPOINT) as temporary:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
        with open(temporary, "rb") as file:
            sha256 = file_digest(file)
    return sha256


def promote(folder: Path) -> None:
    """Replaces the present checkpoint by the next one, once all members of an ensemble have one."""
    os.replace(folder / NEXT_CHECKPOINT, folder / CHECKPOINT)
    sync_folder(folder)


def settle(folder: Path, chosen: Checkpoint) -> None:
    """Leaves one checkpoint, the present one: that which a run is resumed from."""
    if chosen.name == NEXT_CHECKPOINT:
        promote(folder)
    else:
        (folder / NEXT_CHECKPOINT).unlink(missing_ok=True)


def found(folder: Path, types: Mapping[str, type], state: State) -> list[Checkpoint]:
    """Returns the checkpoints that a run may be resumed from: the present one, and the next.

    Nothing in them is executed.

    Args:
        folder: A run folder.
        types: Names and types of what a checkpoint holds.
        state: Of the run, with the checksums of its checkpoints.

    Raises:
        ValueError: The present one is missing, damaged, not a checkpoint, or a link out of its run.
    """
    if not state.checked:  # of version 0.1
        there = os.path.lexists(folder / CHECKPOINT)
        return [_read(folder, CHECKPOINT, types, None)] if there else []
    if not state.checkpoints:
        return []
    # The next one that is not listed, or damaged, counts as not written: the present one is whole.
    following = _digest(folder, NEXT_CHECKPOINT)
    has_next = following == state.checkpoints[-1]
    if has_next and len(state.checkpoints) == 1 and not os.path.lexists(folder / CHECKPOINT):
        return [_read(folder, NEXT_CHECKPOINT, types, state.checkpoints)]
    allowed = state.checkpoints[:-1] if has_next else state.checkpoints
    if not has_next and following in state.checkpoints:
        allowed = ()
    checkpoints = [_read(folder, CHECKPOINT, types, allowed)]
    if has_next:
        checkpoints.append(_read(folder, NEXT_CHECKPOINT, types, state.checkpoints))
    return checkpoints


def _digest(folder: Path, name: str) -> str | None:
    if not os.path.lexists(folder / name):
        return None
    with open(own_file(folder, name), "rb") as file:
        return file_digest(file)


def _read(
    folder: Path, name: str, types: Mapping[str, type], allowed: Sequence[str] | None
) -> Checkpoint:
    if allowed is not None and not os.path.lexists(folder / name):
        raise ValueError(
            f"'{folder / name}' is missing: start this run anew with --replace. The rows of the "
            "run are good."
        )
    path = own_file(folder, name)
    with open(path, "rb") as file:
        sha256 = file_digest(file)
        if allowed is not None and sha256 not in allowed:
            raise ValueError(
                f"'{path}' is damaged and cannot be read as a checkpoint: start this run anew with "
                "--replace. The rows of the run are good."
            )
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on the byte that is wrong
            raise ValueError(
                f"'{path}' cannot be read as a checkpoint: start this run anew with --replace."
            ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), kind) for key, kind in types.items()
    ):
        raise ValueError(
            f"'{path}' is not a checkpoint of a training run: start this run anew with --replace."
        )
    return Checkpoint(name, sha256, content)


@contextmanager
def must_fit(folder: Path) -> Iterator[None]:
    """Wraps the loading of a state whose inner parts `load` has not checked.

    Args:
        folder: The run folder that the state comes from.

    Raises:
        ValueError: The state is that of another network or optimizer, or damaged.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        raise ValueError(
            f"'{folder / CHECKPOINT}' belongs to another network or optimizer: choose another "
            "--out, or start this run anew with --replace."
        ) from error


# -- random states -----------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the global random states that dropout draws from, of every process.

    The keys are the numbers of the processes, as texts; each state has ``cpu``, and ``cuda`` where
    the device is a GPU.
    """
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if not is_distributed():
        return {"0": own}
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, own)
    return {str(number): state for number, state in enumerate(gathered)}


def restore_random_state(folder: Path, state: Mapping[str, Any], device: torch.device) -> None:
    """Sets the global random states of this process to those that `random_state` returned.

    Args:
        folder: The run folder that the state comes from, for messages.
        state: That of every process.
        device: The device of this process.

    Raises:
        ValueError: The run was made by more or fewer processes, or this is not a random state.
    """
    if len(state) != world_size():
        raise ValueError(
            f"'{folder}' was started by {len(state)} processes and cannot be resumed by "
            f"{world_size()}: start {len(state)}."
        )
    with must_fit(folder):
        own = state[str(rank())]
        torch.set_rng_state(own["cpu"])
        if device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], device)
