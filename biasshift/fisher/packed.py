"""Sums of outer products, one symmetric matrix per unit, of which only the upper triangle is
computed and kept.

A matrix of ``d`` inputs is cut into block rows of a few inputs: block row ``J`` holds the columns
from ``J``'s first input on. Each is one large matrix product, so half of the naive work is saved
without leaving the fast path of the BLAS: 1.3 to 1.9 times the rate of a plain matrix product,
counting the naive work, where there are as many units as inputs.

Products are formed in the dtype of the samples, and added up in float64. A sum over one batch stays
in the dtype of its products, which loses nothing and takes half of the memory; the second batch
makes it float64. An empty sum takes none.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Rows = list[Tensor]  # block row J: (units, rows of J, inputs - first input of J)

# inputs in a block row: wider ones waste more of the diagonal (a quarter of the rate at 64),
# narrower ones starve the product
ROWS = 16
OUTER_ROWS = 4  # block rows in one product of `add_outer`, whose matrices are small
MOST_SAMPLES = 4096  # summed in the dtype of the samples, before they go on in float64
TEMPORARY = {
    "cpu": 2**22,
    "cuda": 2**26,
}  # elements of the largest temporary: below, threads and kernels wait for each other


def starts(inputs: int) -> list[tuple[int, int]]:
    """The (first, last + 1) input of every block row. A function of ``inputs`` alone, so that any
    two sums can be added.
    """
    return [(i, min(i + ROWS, inputs)) for i in range(0, inputs, ROWS)]


def zeros(units: int, inputs: int, device: torch.device) -> Rows:
    """A sum over nothing: one zero, seen from everywhere."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return [zero.expand(units, j - i, inputs - i) for i, j in starts(inputs)]


def is_empty(block: Tensor) -> bool:
    """Whether nothing was added yet."""
    return block.stride() == (0, 0, 0)


def add_weighted(
    rows: Rows, a: Float[Tensor, "samples inputs"], weights: Float[Tensor, "samples units"]
) -> None:
    """``rows[u] += Σₙ weights[n, u] aₙ aₙᵀ``, in place.

    The weights multiply whichever factor is smaller: the products ``a_J ⊗ a_{J:}`` where there are
    more units than columns, else the rows ``a_J`` of every unit. Either way the rest is one matrix
    product per block row, its memory laid out as the block's own, and both temporaries are used
    again and again: fresh memory is slow.
    """
    units, inputs, scratch = weights.shape[1], a.shape[1], Scratch(a)
    for k, (i, j) in enumerate(starts(inputs)):
        shape = (units, j - i, inputs - i)
        for n in range(0, len(a), MOST_SAMPLES):
            product = a.new_empty(shape) if is_empty(rows[k]) else scratch.product(shape)
            some = slice(n, n + MOST_SAMPLES)
            _multiply(product, a[some, i:j], a[some, i:], weights[some], scratch)
            add_block(rows, k, product)


def _multiply(
    product: Tensor, head: Tensor, tail: Tensor, weights: Tensor, scratch: "Scratch"
) -> None:
    """``product[u] = Σₙ weights[n, u] headₙ tailₙᵀ``."""
    units, rows, width = product.shape
    by_products = units > width
    for n in scratch.chunks(len(head), rows * min(units, width)):
        if by_products:
            factor = scratch.factor(head[n, :, None], tail[n, None, :])
            left, right, out = weights[n].T, factor.flatten(1), product.view(units, -1)
        else:
            factor = scratch.factor(weights[n, :, None], head[n, None, :])
            left, right, out = factor.flatten(1).T, tail[n], product.view(-1, width)
        out.addmm_(left, right, beta=0 if n.start == 0 else 1)


def add_outer(rows: Rows, vectors: Float[Tensor, "units samples inputs"]) -> None:
    """``rows[u] += Σₙ vᵤₙ vᵤₙᵀ``, in place: every unit has vectors of its own."""
    blocks = starts(vectors.shape[2])
    for k in range(0, len(blocks), OUTER_ROWS):
        together = blocks[k : k + OUTER_ROWS]
        first, last = together[0][0], together[-1][1]
        product = vectors[:, :, first:last].transpose(1, 2) @ vectors[:, :, first:]
        for more, (i, j) in enumerate(together):
            block = product[:, i - first : j - first, i - first :]
            add_block(
                rows,
                k + more,
                block.clone(memory_format=torch.contiguous_format)
                if is_empty(rows[k + more])
                else block,
            )


def add_symmetric(
    rows: Rows, x: Float[Tensor, "units inputs"], y: Float[Tensor, "units inputs"]
) -> None:
    """``rows[u] += xᵤ yᵤᵀ + yᵤ xᵤᵀ``, in place, for `copied` rows."""
    for (i, j), block in zip(starts(x.shape[1]), rows, strict=True):
        block += x[:, i:j, None] * y[:, None, i:] + y[:, i:j, None] * x[:, None, i:]


def add_block(rows: Rows, k: int, product: Tensor) -> None:
    """``rows[k] += product``: the first is kept as it is, all others are added in float64."""
    rows[k] = product if is_empty(rows[k]) else rows[k].double().add_(product)


def copied(rows: Rows) -> Rows:
    """The same sums in float64, in memory of their own."""
    return [block.to(torch.float64, copy=True) for block in rows]


def dense(rows: Rows, units: slice | Tensor = slice(None)) -> Float[Tensor, "units inputs inputs"]:
    """The whole matrices of the given units, both triangles, in float64."""
    inputs = rows[0].shape[2]
    full = torch.empty(
        rows[0][units].shape[0], inputs, inputs, dtype=torch.float64, device=rows[0].device
    )
    for (i, j), block in zip(starts(inputs), rows, strict=True):
        full[:, i:j, i:] = block[units]
        full[:, j:, i:j] = block[units][:, :, j - i :].transpose(1, 2)
    return full


def stack(parts: Sequence[Rows]) -> Rows:
    """The rows of several groups of units, one after the other."""
    return [torch.cat(blocks) for blocks in zip(*parts, strict=True)]


class Scratch:
    """The two temporaries of a sum over weighted samples, made when they are needed first and then
    used again.
    """

    def __init__(self, like: Tensor):
        self._like, self._most = like, TEMPORARY.get(like.device.type, TEMPORARY["cuda"])
        self._factor = self._product = like.new_empty(0)

    def chunks(self, samples: int, width: int) -> Iterator[slice]:
        """Slices of the samples, such that a factor of ``width`` elements per sample stays within
        bounds.
        """
        step = max(64, self._most // width)
        return (slice(n, min(n + step, samples)) for n in range(0, samples, step))

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        """``x * y``, until the next call."""
        shape = torch.broadcast_shapes(x.shape, y.shape)
        if shape.numel() > self._factor.numel():
            self._factor = self._like.new_empty(shape.numel())
        return torch.mul(x, y, out=self._factor[: shape.numel()].view(shape))

    def product(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for one product, until the next call."""
        count = torch.Size(shape).numel()
        if count > self._product.numel():
            self._product = self._like.new_empty(count)
        return self._product[:count].view(shape)
