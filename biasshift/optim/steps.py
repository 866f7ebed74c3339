"""From updates to a step: the trust region, and momentum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)


def within_trust(
    updates: Mapping[Tensor, Tensor], gradients: Sequence[Tensor], lr: float, most: float
) -> dict[Tensor, Tensor]:
    """Returns the updates times ``min(1, √(most / (lr² Σ gᵀΔ)))``.

    An infinite or NaN ``Σ gᵀΔ`` keeps its updates as they are.

    ``gᵀΔ = ΔᵀFΔ`` for a full natural gradient: ``lr² gᵀΔ`` is, to second order, twice the mean
    divergence between the model's answers before and after the step.

    Source: the step clipping of Ba, Grosse & Martens 2017 (distributed K-FAC).
    """
    moved = torch.as_tensor(
        lr**2
        * sum(
            torch.sum(g * update, dtype=torch.float64)
            for g, update in zip(gradients, updates.values(), strict=True)
        )
    )
    shorter = (most / moved.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    scale = torch.where(moved > most, shorter, 1.0)
    return {p: update * scale.to(update.dtype) for p, update in updates.items()}


def with_momentum(
    updates: dict[Tensor, Tensor], momentum: float, state: dict[Any, Any]
) -> list[Tensor]:
    """Returns the steps to take, in the order of the parameters.

    ``state`` is the optimizer's, and keeps their running sums.
    """
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
