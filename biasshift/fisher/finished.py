"""Finished blocks: whole matrices in the user's dtype, both triangles, in one pass over memory.

A finished block is ``scale S + x yᵀ + y xᵀ``, where S are the second moments about the reference of
a layer, and the rank-two correction moves them where they belong. Every piece is multiplied,
corrected and mirrored while it is in the cache.

The work is done in the dtype of the samples, at least float32. In float32 an element is off by
``(N + 4) ε (scale Σ δ² |a||a|ᵀ + |x||y|ᵀ + |y||x|ᵀ)`` at most, with activations about the reference
and N samples: as much as sums of N products are off in any order, and 4 roundings more. Block rows
are finished by `packed.finish`, samples here.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.theory import Scalars, Vectors

# inputs in a block row, and the width up to which both triangles are multiplied: small products
# starve
ROWS = 112
WHOLE = 256


def from_samples(
    out: Float[Tensor, "units params params"],
    a: Float[Tensor, "samples inputs"],
    delta2: Float[Tensor, "units samples"],
    scale: Scalars,
    x: Vectors,
    y: Vectors,
) -> None:
    """Fills blocks from samples, with the correction as two more samples of every unit.

    Args:
        out: the first ``inputs`` rows and columns of every matrix are written.
        a, delta2: activations about the reference, and their weights, of one dtype.
        scale: of every unit, float64.
        x, y: the correction, float64.
    """
    samples, inputs = a.shape
    units = len(delta2)
    most = packed.TEMPORARY.get(a.device.type, packed.TEMPORARY["cuda"])
    step = max(1, min(units, most // (2 * (samples + 2) * inputs)))
    left, right = a.new_empty(2, step, samples + 2, inputs)
    right[:, :samples] = a
    weights = delta2 * scale.to(a.dtype)[:, None]
    width = inputs if inputs <= WHOLE else ROWS
    for start in range(0, units, step):
        own = slice(start, min(start + step, units))
        L, R = left[: own.stop - start], right[: own.stop - start]
        torch.mul(a, weights[own, :, None], out=L[:, :samples])
        L[:, samples], L[:, samples + 1] = x[own], y[own]
        R[:, samples], R[:, samples + 1] = y[own], x[own]
        F = out[own]
        same = F.dtype == a.dtype
        for i in range(0, inputs, width):
            j = min(i + width, inputs)
            if same:
                F[:, i:j, i:inputs].baddbmm_(L[:, :, i:j].mT, R[:, :, i:], beta=0)
            else:
                F[:, i:j, i:inputs] = L[:, :, i:j].mT @ R[:, :, i:]
            F[:, j:inputs, i:j] = F[:, i:j, j:inputs].mT


def by_samples(parts: Sequence[Tensor], inputs: int) -> bool:
    """Returns whether `from_samples` is the faster way, and sums few enough samples in a row.

    Block rows of `packed` save half of the products, and cost a pass over the blocks.

    Args:
        parts: the activations of the parts, (samples, inputs) each.
    """
    samples = sum(map(len, parts))
    few = samples <= packed.MOST_SAMPLES and len(parts) == 1
    return few and (inputs > WHOLE or samples <= 2 * inputs)
