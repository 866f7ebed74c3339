"""Solvers by Cholesky factors in float64, where these are cheaper than iterating.

Samples are kept in place of blocks, and factors are formed when they are used, for some units at a
time. Where there are fewer samples than inputs, it is their Gram matrix that is factored
(`Woodbury`, `unit_woodbury`), else the block after all (`block_cholesky`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from biasshift.fisher.parts import PartWithRows, SampledSums, Samples
from biasshift.fisher.triangles import solved
from biasshift.theory import Scalars, Vectors, dot

FACTOR_BYTES = 2**28  # of the matrices of all units solved together
DirectSolver = Callable[[SampledSums, Tensor, Tensor], Tensor]  # from sums, b and ridge


class Woodbury:
    """``(YᵀY + τ I)⁻¹ b = (b − Yᵀ (YYᵀ + τ I)⁻¹ Y b)/τ``, with samples that all units share.

    The rows of Y are samples times the root of their weight under q. The Gram matrix of the samples
    is that of all units: ``YYᵀ`` is read off it.

    Args:
        sums: the sums of a layer whose parts are all `Samples`.
    """

    def __init__(self, sums: SampledSums):
        self.a = torch.cat([part.a for part in sums.parts if isinstance(part, Samples)]).double()
        self.gram = self.a @ self.a.T

    def solve(self, sums: SampledSums, b: Vectors, ridge: Scalars) -> Tensor:
        """Returns ``(V + τ I)⁻¹ b`` for some units, float64.

        Args:
            sums: those of the units, from the same samples.
            b: the right sides.
            ridge: τ > 0 of every unit.
        """
        delta2 = torch.cat([part.delta2 for part in sums.parts if isinstance(part, Samples)], 1)

        def solve(units: Tensor) -> Tensor:
            q = delta2[units].double() / sums.weight[units, None]
            root, mean, h = q.sqrt(), q @ self.a, q @ self.gram
            # root ∘ (gram − h 1ᵀ − 1 hᵀ + qᵀh) ∘ rootᵀ, the last three as one product
            K = self.gram * root[:, :, None]
            x = root * (0.5 * dot(q, h)[:, None] - h)
            K.mul_(root[:, None, :])
            K.baddbmm_(torch.stack([x, root], 2), torch.stack([root, x], 1))
            Yb = root * (b[units] @ self.a.T - dot(mean, b[units])[:, None])
            z = root * _cholesky_solved(K, ridge[units], Yb)
            return (b[units] - z @ self.a + z.sum(1, keepdim=True) * mean) / ridge[units, None]

        return _in_chunks(b, 3 * len(self.a) ** 2, solve)


def unit_woodbury(sums: SampledSums, b: Vectors, ridge: Scalars) -> Tensor:
    """Returns ``(V + τ I)⁻¹ b`` like `Woodbury`, where every unit has rows Y of its own.

    That is a layer with shared weights, from fewer examples × label seeds than inputs.

    Args:
        sums: those of the units, all of whose parts are `PartWithRows`.
        b: the right sides.
        ridge: τ > 0 of every unit.
    """

    def solve(units: Tensor) -> Tensor:
        few = sums.select(units)
        rows = [part.rows() for part in few.parts if isinstance(part, PartWithRows)]
        weights = torch.cat([weights for _, weights in rows], 1).double()
        Y = torch.cat([vectors for vectors, _ in rows], 1).double()
        Y = Y - weights[:, :, None] * few.offset_q[:, None, :]
        Y = Y / few.weight.sqrt()[:, None, None]
        z = _cholesky_solved(Y @ Y.mT, ridge[units], (Y @ b[units, :, None])[:, :, 0])
        return (b[units] - (z[:, None, :] @ Y)[:, 0]) / ridge[units, None]

    return _in_chunks(b, 3 * sum(part.work.rows for part in sums.parts) * b.shape[1], solve)


def block_cholesky(sums: SampledSums, b: Vectors, ridge: Scalars) -> Tensor:
    """Returns ``(V + τ I)⁻¹ b`` by the blocks after all, of a few units at a time.

    They are given up again, so that the memory is bounded; each call forms and factors them anew.

    Args:
        sums: those of the units.
        b: the right sides.
        ridge: τ ≥ 0 of every unit.
    """
    return _in_chunks(
        b,
        4 * b.shape[1] ** 2,
        lambda units: _cholesky_solved(sums.covariances(units), ridge[units], b[units]),
    )


def _cholesky_solved(K: Tensor, ridge: Tensor, b: Tensor) -> Tensor:
    """``(K + τ I)⁻¹ b``, unchecked: the residual shows what rounding made indefinite. Spoils K."""
    K.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return solved(torch.linalg.cholesky_ex(K)[0], b[:, :, None])[:, :, 0]


def _in_chunks(b: Tensor, width: int, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Solves for units whose temporaries, of so many float64 elements each, fit into memory."""
    x = torch.empty_like(b)
    for units in torch.arange(len(b), device=b.device).split(max(1, FACTOR_BYTES // (8 * width))):
        x[units] = solve(units)
    return x
