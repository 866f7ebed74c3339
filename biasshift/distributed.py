"""Several processes on one training run: who we are among them, and sums over all of us. Alone,
everything here is the identity.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed as dist


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; 0 writes the run folders and speaks."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that `torchrun` has started beside this one; without it, nothing happens."""
    if not under_torchrun():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine; any other device as it is."""
    if device.type == "cuda" and device.index is None and under_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def all_reduce_sum(values: Tensor | None, length: int) -> Tensor:
    """The sum over all processes of a float64 vector; ``None`` stands for zeros. ``length`` is the
    same on all of them.
    """
    values = torch.zeros(length, dtype=torch.float64) if values is None else values
    if is_distributed():
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )
        values = values.to(device)
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """What process 0 has; the others' is not looked at. Plain values only."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
