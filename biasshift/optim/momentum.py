"""Momentum of the transformed updates, as in `torch.optim.SGD`."""

from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)


def with_momentum(updates: dict[Tensor, Tensor], momentum: float, state: dict[Any, Any]) -> list[Tensor]:
    """The steps to take, in the order of the parameters; ``state`` is the optimizer's, and keeps their running sums."""
    if not momentum:
        return list(updates.values())
    for p in updates:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    buffers = [state[p]["momentum_buffer"] for p in updates]
    if buffers:
        _foreach_mul_(buffers, momentum)
        _foreach_add_(buffers, list(updates.values()))
    return buffers
