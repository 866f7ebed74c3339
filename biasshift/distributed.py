"""Several processes that train one run together: their ranks, and sums over all of them.

In a process that is alone, every function here is the identity, and torch.distributed need not be
built in. `torchrun` starts several processes, and `process_group` connects them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, distributed as dist

_connections = count()  # of this process to the others


def is_distributed() -> bool:
    """Returns whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Returns the number of this process, from 0; process 0 writes run folders and prints."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes in the group, which is 1 for a process that is alone."""
    return dist.get_world_size() if is_distributed() else 1


def under_torchrun() -> bool:
    """Returns whether `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes_here() -> int:
    """Returns how many processes `torchrun` has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if under_torchrun() else 1


def restarts() -> int:
    """Returns how often `torchrun` has started these processes again; 0 without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if under_torchrun() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connects the processes that `torchrun` has started, for the length of a block.

    They use NCCL on GPUs and Gloo elsewhere. The group is destroyed at the end, also after an
    exception. Without `torchrun`, the block runs as it is.
    """
    if not under_torchrun():
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, number, size = next(rendezvous("env://"))
    # Under a name of its own: torchrun keeps the addresses of processes that are gone, and one that
    # is started again, or connects again, would wait for those.
    name = f"biasshift/{restarts()}/{next(_connections)}"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(name, store),  # pyright: ignore[reportPrivateImportUsage]
        rank=number,
        world_size=size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Returns the GPU of this process among those of its machine.

    `torchrun` numbers the processes of a machine in the variable LOCAL_RANK. A CPU, or a GPU that
    already has an index, is returned as it is.
    """
    if device.type == "cuda" and device.index is None and under_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def all_reduce_sum(values: Tensor | None, length: int) -> Tensor:
    """Returns the sum of a vector over all processes, which all of them must call.

    Args:
        values: (length,), float64, or None for zeros. With several processes it may be summed in
            place.
        length: the same on all processes; read only where ``values`` is None.

    Returns:
        The sum, on the current GPU where the processes use NCCL; ``values`` in a process alone.
    """
    values = torch.zeros(length, dtype=torch.float64) if values is None else values
    if is_distributed():
        on_gpu = dist.get_backend() == "nccl"
        values = values.to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Returns the value of process 0, on every process; the values of the others are ignored.

    The value is pickled: use it for numbers, strings and containers of them. All processes must
    call this together, and a process that is alone gets its own value back.
    """
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
