"""A trust region: no step moves the model's answers by more than so much."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def within_trust(updates: Mapping[Tensor, Tensor], gradients: Sequence[Tensor], lr: float, most: float) -> dict[Tensor, Tensor]:
    """The updates times ``min(1, √(most / (lr² Σ gᵀΔ)))``; an infinite or NaN ``Σ gᵀΔ`` keeps its updates as they are.

    ``gᵀΔ = ΔᵀFΔ`` for a full natural gradient: ``lr² gᵀΔ`` is, to second order, twice the mean divergence between the model's
    answers before and after the step.

    Source: the step clipping of Ba, Grosse & Martens 2017 (distributed K-FAC).
    """
    moved = lr**2 * sum(torch.sum(g * update, dtype=torch.float64) for g, update in zip(gradients, updates.values(), strict=True))
    moved = torch.as_tensor(moved)
    scale = torch.where(moved > most, (most / moved.clamp(min=torch.finfo(torch.float64).tiny)).sqrt(), 1.0)
    return {p: update * scale.to(update.dtype) for p, update in updates.items()}
