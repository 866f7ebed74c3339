"""Sums of outer products, one symmetric matrix per unit, of which only the upper triangle is computed and kept.

A matrix of ``d`` inputs is cut into block rows: row block ``J`` holds the columns from ``J``'s first input on. Each is
filled by one large matrix product, so half of the naive work is saved without leaving the fast path of the BLAS.
Products are formed in the dtype of the samples; the sums are float64.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Rows = list[Tensor]  # block row J: (units, rows of J, inputs - first input of J), float64

MOST_ROWS = 64  # wider blocks waste more of the diagonal, narrower ones starve the matrix product
TEMPORARY = 2**22  # elements of the largest temporary: 16 MiB in float32


def starts(inputs: int) -> list[tuple[int, int]]:
    """The (first, last + 1) input of every block row. A function of ``inputs`` alone, so that any two sums can be added."""
    rows = min(MOST_ROWS, max(8, inputs // 8))
    return [(i, min(i + rows, inputs)) for i in range(0, inputs, rows)]


def zeros(units: int, inputs: int, device: torch.device) -> Rows:
    return [torch.zeros(units, j - i, inputs - i, dtype=torch.float64, device=device) for i, j in starts(inputs)]


def add_weighted(rows: Rows, a: Float[Tensor, "samples inputs"], weights: Float[Tensor, "samples units"]) -> None:
    """``rows[u] += Σₙ weights[n, u] aₙ aₙᵀ``, in place.

    The weights multiply whichever factor is smaller: the products ``a_J ⊗ a_{J:}`` where there are more units than
    columns, else the rows ``a_J`` of every unit. Either way the rest is one matrix product per block.
    """
    units, inputs = weights.shape[1], a.shape[1]
    for (i, j), block in zip(starts(inputs), rows, strict=True):
        width = inputs - i
        for n in chunks(len(a), (j - i) * min(units, width)):
            head, tail, w = a[n, i:j], a[n, i:], weights[n]
            if units > width:
                product = w.T @ (head[:, :, None] * tail[:, None, :]).flatten(1)
            else:
                product = (w[:, :, None] * head[:, None, :]).flatten(1).T @ tail
            block += product.view_as(block)


def add_outer(rows: Rows, vectors: Float[Tensor, "samples units inputs"]) -> None:
    """``rows[u] += Σₙ vₙᵤ vₙᵤᵀ``, in place: every unit has vectors of its own."""
    by_unit = vectors.transpose(0, 1)
    for (i, j), block in zip(starts(vectors.shape[2]), rows, strict=True):
        block += by_unit[:, :, i:j].transpose(1, 2) @ by_unit[:, :, i:]


def add_symmetric(rows: Rows, x: Float[Tensor, "units inputs"], y: Float[Tensor, "units inputs"]) -> None:
    """``rows[u] += xᵤ yᵤᵀ + yᵤ xᵤᵀ``, in place."""
    for (i, j), block in zip(starts(x.shape[1]), rows, strict=True):
        block += x[:, i:j, None] * y[:, None, i:] + y[:, i:j, None] * x[:, None, i:]


def dense(rows: Rows, units: slice | Tensor = slice(None)) -> Float[Tensor, "units inputs inputs"]:
    """The whole matrices of the given units, both triangles, in float64."""
    inputs = rows[0].shape[2]
    full = torch.empty(rows[0][units].shape[0], inputs, inputs, dtype=torch.float64, device=rows[0].device)
    for (i, j), block in zip(starts(inputs), rows, strict=True):
        full[:, i:j, i:] = block[units]
        full[:, j:, i:j] = block[units][:, :, j - i :].transpose(1, 2)
    return full


def stack(parts: Sequence[Rows]) -> Rows:
    """The rows of several groups of units, one after the other."""
    return [torch.cat(blocks) for blocks in zip(*parts, strict=True)]


def chunks(samples: int, width: int) -> Iterator[slice]:
    """Slices of the samples, such that a temporary of ``width`` elements per sample stays within bounds."""
    step = max(64, TEMPORARY // max(width, 1))
    return (slice(i, i + step) for i in range(0, samples, step))
