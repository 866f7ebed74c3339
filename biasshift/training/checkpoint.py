"""Where a training run stood: enough to go on to the same numbers as one that was never
interrupted.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from biasshift.distributed import broadcast, is_distributed, rank, world_size
from biasshift.runs.schema import own_file

CHECKPOINT = "checkpoint.pt"


def random_state(device: torch.device) -> dict[str, Any]:
    """The global random states that dropout draws from, of every process."""
    own = {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )
    if not is_distributed():
        return {"0": own}
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, own)
    return {str(rank): state for rank, state in enumerate(gathered)}


def restore_random_state(folder: Path, state: Mapping[str, Any], device: torch.device) -> None:
    """Undoes what has been drawn since `random_state`.

    Raises:
        ValueError: the run was made by more or fewer processes, or this is no random state.
    """
    if len(state) != world_size():
        raise ValueError(
            f"'{folder}' was begun by {len(state)} processes and is resumed by {world_size()}: start as "
            "many."
        )
    with fitting(folder):
        own = state[str(rank())]
        torch.set_rng_state(own["cpu"])
        if device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], device)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Written under another name, synced and renamed: a kill leaves the earlier checkpoint."""
    temporary = folder / f".{CHECKPOINT}.tmp"
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT)


def load(folder: Path, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """The checkpoint of a run folder, or ``None`` where there is none; process 0 reads it for all.
    Nothing in it is executed.

    Args:
        kinds: what a checkpoint holds: names and types.

    Raises:
        ValueError: the file is damaged or no checkpoint.
    """
    return broadcast(
        _read(folder / CHECKPOINT, kinds)
        if rank() == 0 and os.path.lexists(folder / CHECKPOINT)
        else None
    )


def _read(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    remedy = "delete it to begin this run anew with --replace."
    path = own_file(path.parent, path.name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on the byte that is wrong
        raise ValueError(f"'{path}' is no readable checkpoint: {remedy}") from error
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"'{path}' is no checkpoint of a training run: {remedy}")
    return state


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Around what takes a checkpoint in, whose inner parts nobody has looked at.

    Raises:
        ValueError: they are those of another network or optimizer, or nonsense.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        raise ValueError(
            f"'{folder / CHECKPOINT}' is of another network or optimizer: give this run another "
            "--out, or begin it anew with --replace."
        ) from error
