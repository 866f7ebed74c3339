"""Sums of outer products: one symmetric matrix per unit, kept as its upper triangle.

A matrix of ``d`` inputs is cut into block rows of a few inputs: block row ``J`` holds the columns
from ``J``'s first input on. Each is one large matrix product, so that half of the naive work is
saved without leaving the fast path of the BLAS. Where there are as many units as inputs, the naive
work is done at 1.3 to 1.9 times the rate of a plain matrix product.

Products are formed in the dtype of the samples, and added up in float64. A sum over one batch stays
in the dtype of its products, which loses nothing and takes half of the memory; the second batch
makes it float64. An empty sum takes none.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

Rows = list[Tensor]  # block row J: (units, rows of J, inputs - first input of J)

# inputs in a block row: wider ones waste more of the diagonal (a quarter of the rate at 64),
# narrower ones starve the product
ROWS = 16
OUTER_ROWS = 4  # block rows in one product of `add_outer`, whose matrices are small
MOST_SAMPLES = 4096  # summed in the dtype of the samples, before they go on in float64
# elements of the largest temporary: below, threads and kernels wait for each other
TEMPORARY = {"cpu": 2**22, "cuda": 2**26}


def zeros(units: int, inputs: int, device: torch.device) -> Rows:
    """Returns a sum over no samples.

    All block rows are views of one zero, which takes 8 bytes. Functions of this file replace an
    empty block row as a whole, and never write into it.

    >>> rows = zeros(3, 20, torch.device("cpu"))
    >>> [tuple(block.shape) for block in rows]
    [(3, 16, 20), (3, 4, 4)]
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return [zero.expand(units, j - i, inputs - i) for i, j in bounds(inputs)]


def block_bytes(units: int, inputs: int) -> int:
    """Returns the bytes that the block rows of a layer take in float64.

    It is a little more than half of whole matrices: ``8 units inputs² / 2``, and the lower triangle
    of every block on the diagonal.
    """
    return 8 * units * sum((j - i) * (inputs - i) for i, j in bounds(inputs))


def add_weighted(
    rows: Rows, a: Float[Tensor, "samples inputs"], weights: Float[Tensor, "samples units"]
) -> None:
    """Adds ``Σₙ weights[n, u] aₙ aₙᵀ`` to every unit u, in place.

    The weights multiply whichever factor is smaller: the products ``a_J ⊗ a_{J:}`` where there are
    more units than columns, else the rows ``a_J`` of every unit. Either way the rest is one matrix
    product per block row, its memory laid out as the block's own. Both temporaries are used again
    and again, because fresh memory is slow.
    """
    units, inputs, scratch = weights.shape[1], a.shape[1], _Scratch(a)
    for k, (i, j) in enumerate(bounds(inputs)):
        shape = (units, j - i, inputs - i)
        for start in range(0, len(a), MOST_SAMPLES):
            product = a.new_empty(shape) if _is_empty(rows[k]) else scratch.take("product", shape)
            n = slice(start, start + MOST_SAMPLES)
            _multiply(product, a[n, i:j], a[n, i:], weights[n], scratch)
            rows[k] = _added(rows[k], product)


def _multiply(
    product: Tensor, head: Tensor, tail: Tensor, weights: Tensor, scratch: "_Scratch"
) -> None:
    """``product[u] = Σₙ weights[n, u] headₙ tailₙᵀ``."""
    units, rows, width = product.shape
    for n in scratch.chunks(len(head), rows * min(units, width)):
        if units > width:
            factor = scratch.factor(head[n, :, None], tail[n, None, :])
            left, right, out = weights[n].T, factor.flatten(1), product.view(units, -1)
        else:
            factor = scratch.factor(weights[n, :, None], head[n, None, :])
            left, right, out = factor.flatten(1).T, tail[n], product.view(-1, width)
        out.addmm_(left, right, beta=0 if n.start == 0 else 1)


def add_outer(rows: Rows, vectors: Float[Tensor, "units samples inputs"]) -> None:
    """Adds ``Σₙ vᵤₙ vᵤₙᵀ`` to every unit u, in place.

    Every unit has vectors of its own, so that one product serves one unit. A few block rows share
    a product: the matrices are small, and a call costs more than the work it saves.
    """
    pieces = bounds(vectors.shape[2])
    for k in range(0, len(pieces), OUTER_ROWS):
        first, last = pieces[k][0], pieces[k : k + OUTER_ROWS][-1][1]
        product = vectors[:, :, first:last].transpose(1, 2) @ vectors[:, :, first:]
        for row, (i, j) in enumerate(pieces[k : k + OUTER_ROWS], start=k):
            block = product[:, i - first : j - first, i - first :]
            if _is_empty(rows[row]):  # it is kept, and a view would keep the lower triangle alive
                block = block.clone(memory_format=torch.contiguous_format)
            rows[row] = _added(rows[row], block)


def add_symmetric(
    rows: Rows, x: Float[Tensor, "units inputs"], y: Float[Tensor, "units inputs"]
) -> None:
    """Adds ``xᵤ yᵤᵀ + yᵤ xᵤᵀ`` to every unit u, in place.

    The rows must be `copied`: in float64, and in memory of their own.
    """
    for (i, j), block in zip(bounds(x.shape[1]), rows, strict=True):
        block += x[:, i:j, None] * y[:, None, i:] + y[:, i:j, None] * x[:, None, i:]


def copied(rows: Rows) -> Rows:
    """Returns the same sums in float64, in memory of their own, which may be changed in place."""
    return [block.to(torch.float64, copy=True) for block in rows]


def total(parts: Sequence[Rows]) -> Rows:
    """Returns the sum of several sums over the same units and inputs.

    The blocks of the first part are added to in place where they are float64 already.
    """
    return [reduce(_added, blocks) for blocks in zip(*parts, strict=True)]


def stack(parts: Sequence[Rows]) -> Rows:
    """Returns the sums of several groups of units, one group after the other.

    All groups must have the same number of inputs. This is how a grouped convolution becomes one
    layer: the sums of each group are made alone.
    """
    return [torch.cat(blocks) for blocks in zip(*parts, strict=True)]


def dense(rows: Rows, units: slice | Tensor = slice(None)) -> Float[Tensor, "units inputs inputs"]:
    """Returns the whole matrices of some units, both triangles, in float64.

    Args:
        rows: the sums of all units.
        units: the units wanted, as a slice or a tensor of indices; all by default, which takes
            about twice the memory of their rows in float64.

    >>> rows = zeros(1, 2, torch.device("cpu"))
    >>> add_weighted(rows, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    >>> dense(rows)
    tensor([[[ 3.,  6.],
             [ 6., 12.]]], dtype=torch.float64)
    """
    count, inputs = rows[0][units].shape[0], rows[0].shape[2]
    full = torch.empty(count, inputs, inputs, dtype=torch.float64, device=rows[0].device)
    for (i, j), block in zip(bounds(inputs), rows, strict=True):
        full[:, i:j, i:] = block[units]
        full[:, j:, i:j] = block[units][:, :, j - i :].transpose(1, 2)
    return full


def finish(
    out: Float[Tensor, "units params params"],
    rows: Rows,
    scale: Float[Tensor, " units"],
    x: Float[Tensor, "units inputs"],
    y: Float[Tensor, "units inputs"],
) -> None:
    """Writes ``scale S + x yᵀ + y xᵀ`` into whole matrices of any dtype, row by row.

    It is worked out in the dtype of the rows; see `finished` for what that loses.

    Args:
        out: the first ``inputs`` rows and columns of every matrix are written.
        rows: the sums S.
        scale, x, y: float64.
    """
    inputs = x.shape[1]
    for (i, j), block in zip(bounds(inputs), rows, strict=True):
        narrow = [v.to(block.dtype) for v in (x, y)]
        part = block * scale.to(block.dtype)[:, None, None]
        for v, w in (narrow, narrow[::-1]):
            part.addcmul_(v[:, i:j, None], w[:, None, i:])
        out[:, i:j, i:inputs] = part
        out[:, j:inputs, i:j] = part[:, :, j - i :].mT


def bounds(inputs: int) -> list[tuple[int, int]]:
    """Returns the first and last + 1 input of every block row.

    They depend on ``inputs`` alone, so that any two sums can be added.
    """
    return [(i, min(i + ROWS, inputs)) for i in range(0, inputs, ROWS)]


def _is_empty(block: Tensor) -> bool:
    return block.stride() == (0, 0, 0)


def _added(block: Tensor, product: Tensor) -> Tensor:
    """One block row and a product: the first one is kept as it is, all others add in float64."""
    return product if _is_empty(block) else block.double().add_(product)


class _Scratch:
    """The two temporaries of a weighted sum, made when they are needed first and then reused."""

    def __init__(self, like: Tensor):
        self._like, self._most = like, TEMPORARY.get(like.device.type, TEMPORARY["cuda"])
        self._memory: dict[str, Tensor] = {}

    def chunks(self, samples: int, width: int) -> Iterator[slice]:
        """Slices of the samples, whose factor of ``width`` elements each stays within bounds."""
        step = max(64, self._most // width)
        return (slice(n, min(n + step, samples)) for n in range(0, samples, step))

    def factor(self, x: Tensor, y: Tensor) -> Tensor:
        """``x * y``, until the next call."""
        return torch.mul(x, y, out=self.take("factor", torch.broadcast_shapes(x.shape, y.shape)))

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory for one temporary, until the next call for the same."""
        count = math.prod(shape)
        if name not in self._memory or count > self._memory[name].numel():
            self._memory[name] = self._like.new_empty(count)
        return self._memory[name][:count].view(shape)
