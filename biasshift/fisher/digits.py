"""What the dtype of a model cannot carry: numbers of units that rounding decides."""

import torch
from torch import Tensor

from biasshift.fisher.cholesky import variances
from biasshift.fisher.moments import Sums

MOST_MOVED = 0.1  # what rounding may move k by
MOST_CANCELLED = 1e-4  # what rounding may be of a unit's second moments
MOST_LOST = 100  # errors of so many times the smallest number of their dtype are off by percents


def moved_by_rounding(sums: Sums, x: Tensor) -> Tensor:
    """Returns how far k moves where activations are rounded by one part of themselves, (units,).

    Times the machine precision ε it is the error of k. Rounding an activation of size σ moves it by
    ``ε σ/√12`` at random, which averages over the effective samples: ``|σ ∘ x| / √(12 N_eff)``.
    Sums are about a reference: where activations are farther from it than from 0, that counts.

    Args:
        sums: those of the layer.
        x: ``V⁻¹m``, (units, inputs).
    """
    squares = _squares(sums).maximum(sums.squares_q)  # σ²
    return ((squares * x**2).sum(1) / (12 * sums.effective_samples)).sqrt()


def cancelled(sums: Sums, dtype: torch.dtype) -> Tensor:
    """Returns the units whose second moments are small differences of large ones, (units,) bool.

    They are summed about a reference, the mean of all samples. Where samples with nearly all weight
    are far from it and near 0, such as a padding behind which a norm divides by its ε, moving them
    to 0 cancels.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return eps * sums.squares_q.sum(1) > MOST_CANCELLED * _squares(sums).sum(1)


def _squares(sums: Sums) -> Tensor:
    """``E_q a²``, (units, inputs)."""
    return variances(sums) + sums.mean_q**2


def lost_errors(sums: Sums, dtype: torch.dtype) -> Tensor:
    """Returns the units whose errors are near the smallest number of the dtype, (units,) bool.

    In float16 dead units are among them: errors below 6e-8 are 0 there.
    """
    info = torch.finfo(dtype)
    size = (sums.weight_squares / sums.weight).sqrt().sqrt()  # of δ, as q weighs it
    lost = size < MOST_LOST * info.smallest_normal * info.eps
    return lost | sums.dead if dtype == torch.float16 else lost


def out_of_range(sums: Sums, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the units whose c or s the dtype cannot hold, (units,) bool."""
    info, c = torch.finfo(dtype), sums.mean_delta2
    return ~(sums.dead | sums.bias_inert) & ((c < info.smallest_normal) | (s > info.max))
