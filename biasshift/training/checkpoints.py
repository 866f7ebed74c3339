"""Where a training run stood: enough to go on to the same numbers as one that was never interrupted."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biasshift.layout import own_file
from biasshift.training.processes import rank, together, told, world

CHECKPOINT = "checkpoint.pt"


def random_state(device: torch.device) -> dict[str, Any]:
    """The global random states that dropout draws from, of every process."""
    own = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
    if not together():
        return {"0": own}
    gathered: list[Any] = [None] * world()
    torch.distributed.all_gather_object(gathered, own)
    return {str(rank): state for rank, state in enumerate(gathered)}


def restore_random_state(state: Mapping[str, Any], rank: int, device: torch.device) -> None:
    """Undoes what has been drawn since `random_state`.

    Raises:
        ValueError: the run was made by fewer processes.
    """
    if str(rank) not in state or len(state) != world():
        raise ValueError(f"the run was made by {len(state)} processes and is resumed by {world()}: start as many.")
    torch.set_rng_state(state[str(rank)]["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state[str(rank)]:
        torch.cuda.set_rng_state(state[str(rank)]["cuda"].cpu(), device)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Written under another name, synced and renamed: a kill leaves the earlier checkpoint."""
    temporary = folder / f".{CHECKPOINT}.tmp"
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT)


def load(folder: Path, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """The checkpoint of a run folder, or ``None`` where there is none; process 0 reads it for all. Nothing in it is executed.

    Args:
        kinds: what a checkpoint holds: names and types.

    Raises:
        ValueError: the file is damaged or no checkpoint.
    """
    return told(_read(folder / CHECKPOINT, kinds) if rank() == 0 and os.path.lexists(folder / CHECKPOINT) else None)


def _read(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    remedy = "delete it to begin this run anew with --replace."
    path = own_file(path.parent, path.name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on the byte that is wrong
        raise ValueError(f"'{path}' is no readable checkpoint: {remedy}") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"'{path}' is no checkpoint of a training run: {remedy}")
    return state


def restore(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts the weights of a checkpoint into a model.

    Raises:
        ValueError: they are those of another network.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path / CHECKPOINT}' holds the weights of another network: give this run another --out.") from error
