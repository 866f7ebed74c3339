"""Where a training run stood: enough to resume it to the numbers of an uninterrupted run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from biasshift.atomic import replacing
from biasshift.distributed import broadcast, is_distributed, rank, world_size
from biasshift.runs.schema import own_file

CHECKPOINT = "checkpoint.pt"

# -- the file ----------------------------------------------------------------------------------


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a run folder: a kill leaves the earlier one or this one, whole.

    Args:
        folder: A run folder.
        state: Tensors, numbers, texts, and lists and dicts of them: what `load` accepts.
    """
    with replacing(folder / CHECKPOINT) as temporary, open(temporary, "wb") as file:
        torch.save(dict(state), file)


def load(folder: Path, types: Mapping[str, type]) -> dict[str, Any] | None:
    """Returns the checkpoint of a run folder, or ``None`` where there is none.

    Process 0 reads it for all. Nothing in it is executed.

    Args:
        folder: A run folder.
        types: Names and types of what a checkpoint holds.

    Raises:
        ValueError: The file is damaged, not a checkpoint, or a link out of its run.
    """
    there = rank() == 0 and os.path.lexists(folder / CHECKPOINT)
    return broadcast(_read(folder, types) if there else None)


def _read(folder: Path, types: Mapping[str, type]) -> dict[str, Any]:
    path = own_file(folder, CHECKPOINT)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on the byte that is wrong
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint: start this run anew with --replace."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in types.items()
    ):
        raise ValueError(
            f"'{path}' is not a checkpoint of a training run: start this run anew with --replace."
        )
    return state


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
