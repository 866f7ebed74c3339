"""Solving for some units at a time by a Cholesky factor in float64, where the samples say that this
is cheaper than iterating.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher.convolution import Maps
from biasshift.fisher.samples import ImplicitSums, Samples
from biasshift.theory import dot

FACTORS = 2**28  # bytes of the matrices of all units solved together

Sides = Float[Tensor, "units inputs"]
Ridges = Float[Tensor, " units"]


class Woodbury:
    """``(YᵀY + τ I)⁻¹ b = (b − Yᵀ (YYᵀ + τ I)⁻¹ Y b)/τ``, where the rows of Y are samples times the
    root of their weight under q.

    For fewer samples than inputs. The Gram matrix of the samples is that of all units: ``YYᵀ`` is
    read off it.
    """

    def __init__(self, sums: ImplicitSums):
        self.a = torch.cat([part.a for part in sums.parts if isinstance(part, Samples)]).double()
        self.gram = self.a @ self.a.T

    def solve(self, sums: ImplicitSums, b: Sides, ridge: Ridges) -> Tensor:
        x = torch.empty_like(b)
        delta2 = torch.cat([part.delta2 for part in sums.parts if isinstance(part, Samples)], 1)
        for units in _together(len(b), 3 * len(self.a) ** 2, b.device):
            q = delta2[units].double() / sums.weight[units, None]
            x[units] = self._solve(q, b[units], ridge[units])
        return x

    def _solve(self, q: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
        root, mean, h = q.sqrt(), q @ self.a, q @ self.gram
        K = self.gram - h[:, :, None] - h[:, None, :] + dot(q, h)[:, None, None]
        K.mul_(root[:, :, None]).mul_(root[:, None, :])
        Yb = root * (b @ self.a.T - dot(mean, b)[:, None])
        z = root * _cholesky_solved(K, ridge, Yb)
        return (b - z @ self.a + z.sum(1, keepdim=True) * mean) / ridge[:, None]


class Rows:
    """The same where every unit has rows of its own: shared weights with fewer examples × label
    seeds than inputs.
    """

    def solve(self, sums: ImplicitSums, b: Sides, ridge: Ridges) -> Tensor:
        x = torch.empty_like(b)
        rows = sum(part.work.rows for part in sums.parts)
        for units in _together(len(b), 3 * rows * b.shape[1], b.device):
            some = sums.select(units)
            found = [part.rows() for part in some.parts if isinstance(part, Maps)]
            weights = torch.cat([w for _, w in found], 1).double()
            Y = torch.cat([y for y, _ in found], 1).double()
            Y = (Y - weights[:, :, None] * some.offset_q[:, None, :]) / some.weight.sqrt()[
                :, None, None
            ]
            z = _cholesky_solved(Y @ Y.mT, ridge[units], (Y @ b[units, :, None])[:, :, 0])
            x[units] = (b[units] - (z[:, None, :] @ Y)[:, 0]) / ridge[units, None]
        return x


class Blocks:
    """The blocks after all, of a few units at a time, and given up again."""

    def solve(self, sums: ImplicitSums, b: Sides, ridge: Ridges) -> Tensor:
        x = torch.empty_like(b)
        for units in _together(len(b), 4 * b.shape[1] ** 2, b.device):
            x[units] = _cholesky_solved(sums.covariances(units), ridge[units], b[units])
        return x


def _cholesky_solved(K: Tensor, ridge: Tensor, b: Tensor) -> Tensor:
    """``(K + τ I)⁻¹ b``; what rounding has made indefinite is found out by its residual. Spoils K."""
    K.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return torch.cholesky_solve(b[:, :, None], torch.linalg.cholesky_ex(K)[0])[:, :, 0]


def _together(units: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Units whose temporaries, of so many float64 elements each, fit into memory."""
    return iter(torch.arange(units, device=device).split(max(1, FACTORS // (8 * width))))
