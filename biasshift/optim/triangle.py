"""One symmetric matrix per unit, of which the upper triangle is kept, summed and factored.

A matrix is cut into block rows of a few inputs. Block row ``J`` holds the columns from ``J``'s
first input on. Sums grow in place: new products and the decay of the old ones are one call of the
BLAS per block row, and take no temporary of the matrices' size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = list[Tensor]  # block row J: (units, rows of J, inputs - first input of J)

ROWS = 16  # inputs in a block row, as of `biasshift.fisher.packed`, whose sums old states hold
ELEMENTS = 2**22  # of the largest temporary
BLOCK = 16  # inputs that are factored at a time


@dataclass
class Weighted:
    """``Σₙ weights[n, u] aₙ aₙᵀ`` for every unit u."""

    a: Tensor  # (samples, inputs)
    weights: Tensor  # (samples, units), ≥ 0

    def rows(self) -> Rows:
        """Returns memory for the sums."""
        return _empty(self.a, self.weights.shape[1], self.a.shape[1])

    def add_to(self, rows: Rows, decay: float) -> None:
        """Multiplies the sums with ``decay``, 0 for new memory, and adds the products, in place."""
        units, inputs = self.weights.shape[1], self.a.shape[1]
        for row in rows if len(self.a) == 0 else ():
            row.mul_(decay) if decay else row.zero_()
        for (i, j), row in zip(bounds(inputs), rows, strict=True):
            width, kept = inputs - i, decay
            # the weights multiply whichever factor is smaller
            step = max(64, ELEMENTS // ((j - i) * min(units, width)))
            for n in (slice(k, k + step) for k in range(0, len(self.a), step)):
                head, tail, weights = self.a[n, i:j], self.a[n, i:], self.weights[n]
                if units > width:
                    pairs = (head[:, :, None] * tail[:, None, :]).flatten(1)
                    row.view(units, -1).addmm_(weights.T, pairs, beta=kept)
                else:
                    heads = (weights[:, :, None] * head[:, None, :]).flatten(1)
                    row.view(-1, width).addmm_(heads.T, tail, beta=kept)
                kept = 1.0

    def bound(self) -> Tensor:
        """Returns a number, (), that no sum of these products exceeds."""
        return self.weights.sum() * self.a.abs().max().square()


@dataclass
class Outer:
    """``Σₙ vᵤₙ vᵤₙᵀ`` for every unit u, whose vectors are its own."""

    vectors: Tensor  # (units, samples, inputs)

    def rows(self) -> Rows:
        """Returns memory for the sums."""
        return _empty(self.vectors, len(self.vectors), self.vectors.shape[2])

    def add_to(self, rows: Rows, decay: float) -> None:
        """Multiplies the sums with ``decay``, 0 for new memory, and adds the products, in place."""
        for (i, j), row in zip(bounds(self.vectors.shape[2]), rows, strict=True):
            heads, tails = self.vectors[:, :, i:j], self.vectors[:, :, i:]
            row.baddbmm_(heads.mT, tails, beta=decay)

    def bound(self) -> Tensor:
        """Returns a number, (), that no sum of these products exceeds."""
        return self.vectors.square().sum()


Products = Weighted | Outer  # of every unit, still to be formed


def bounds(inputs: int) -> list[tuple[int, int]]:
    """Returns the first and last + 1 input of every block row."""
    return [(i, min(i + ROWS, inputs)) for i in range(0, inputs, ROWS)]


def _empty(like: Tensor, units: int, inputs: int) -> Rows:
    return [like.new_empty(units, j - i, inputs - i) for i, j in bounds(inputs)]


def dense(rows: Rows, units: slice, out: Tensor | None = None) -> Tensor:
    """Returns the matrices of some units; what is below their block rows is undefined.

    Args:
        out: (units, inputs, inputs), memory for them.
    """
    inputs = rows[0].shape[2]
    count = len(rows[0][units])
    full = rows[0].new_empty(count, inputs, inputs) if out is None else out[:count]
    for (i, j), row in zip(bounds(inputs), rows, strict=True):
        full[:, i:j, i:] = row[units]
    return full


def factorize(W: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """Puts the factors ``U`` of ``W = UᵀU`` in place of W, and returns which of them have failed.

    Without damping, a matrix also fails where a pivot is rounding: a pivot is what the inputs
    before leave unexplained of this one. With damping every pivot is at least the ridge, and only
    a matrix that rounding has made indefinite fails.

    Only the upper triangles are read. What is below the diagonal blocks stays as it was. The work
    is in one batched product per block of inputs: LAPACK takes twice as long for small matrices.

    Args:
        W: (units, inputs, inputs), damped already.
        damping: the damping that W has; only whether it is 0 matters.
        dtype: that of the samples, whose precision bounds a pivot.

    Returns:
        (units,) bool; the factors of these are undefined.

    >>> W = torch.tensor([[[4.0, 2.0], [2.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]])
    >>> factorize(W, 0.0, torch.float32)
    tensor([False,  True])
    >>> W[0].triu()
    tensor([[2., 1.],
            [0., 2.]])
    """
    inputs = W.shape[-1]
    failed = torch.zeros(len(W), dtype=torch.bool, device=W.device)
    least = inputs * torch.finfo(dtype).eps * W.diagonal(dim1=1, dim2=2) if damping == 0 else None
    identity = torch.eye(BLOCK, dtype=W.dtype, device=W.device)
    for i in range(0, inputs, BLOCK):
        j = min(i + BLOCK, inputs)
        row = W[:, i:j, i:]
        if i:
            row.baddbmm_(W[:, :i, i:j].mT, W[:, :i, i:], alpha=-1)
        lower, info = torch.linalg.cholesky_ex(row[:, :, : j - i].mT)
        failed |= info > 0
        if least is not None:
            failed |= (lower.diagonal(dim1=1, dim2=2).square() <= least[:, i:j]).any(1)
        size = j - i
        inverse = torch.linalg.solve_triangular(
            lower, identity[:size, :size].expand(len(W), size, size), upper=False
        )
        row[:, :, :size] = lower.mT
        if j < inputs:
            row[:, :, size:] = inverse @ row[:, :, size:]
    return failed


def solve(factors: Tensor, rhs: Tensor) -> Tensor:
    """Returns ``(UᵀU)⁻¹ rhs`` for the rows of ``rhs``, (units, sides, inputs).

    Rows are solved for, not columns: the BLAS reads the factors at twice the rate.
    """
    half = torch.linalg.solve_triangular(factors, rhs, upper=True, left=False)
    return torch.linalg.solve_triangular(factors.mT, half, upper=False, left=False)


def units_at_a_time(inputs: int, itemsize: int, limit: int) -> int:
    """Returns how many matrices take no more than ``limit`` bytes, at least 1."""
    return max(1, limit // (itemsize * math.prod((inputs, inputs))))
