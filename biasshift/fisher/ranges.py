"""The range of single precision: where squares and products would leave it, they are made wider.

Sums of ``δ² a aᵀ`` are formed in the precision of the samples. Of numbers as small as 1e-15 or as
large as 1e15 such products underflow or overflow in single precision, though s, k and the coupling
do not depend on the scale at all.
"""

import math

import torch
from torch import Tensor

# Of products: single precision reaches from 2^-126, with fewer digits from 2^-149, to 2^128.
LOWEST, HIGHEST = 2.0**-110, 2.0**120


def with_range(a: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns activations and weights in a dtype that holds ``Σ weight a²`` of all units.

    That is the dtype they have, or double precision where single precision cannot hold the sums.

    Args:
        a: (…, inputs), about a reference.
        weights: (…, units), ≥ 0.

    >>> a, weights = with_range(torch.full((2, 1), 1e30), torch.ones(2, 1))
    >>> a.dtype, weights.dtype
    (torch.float64, torch.float64)
    """
    if a.dtype == weights.dtype == torch.float64:
        return a, weights
    (low, high), (least, most) = _extent(a, -1), _extent(weights, -1)
    rows = weights.numel() // weights.shape[-1]
    fits = _fits(low**2 * least, rows * high**2 * most) and _fits(low**2, rows * high**2)
    fits = fits and a.dtype == weights.dtype  # errors may have been made wider for their squares
    return (a, weights) if fits else (a.double(), weights.double())


def with_squares(
    a: Tensor, delta: Tensor, axes: tuple[int, int] = (-1, -1)
) -> tuple[Tensor, Tensor]:
    """Returns activations and errors in a dtype that holds ``Σ δ² a²`` of all units.

    Args:
        a: the activations, about a reference.
        delta: the errors.
        axes: those of the inputs, or channels, of ``a``, and of the units of ``delta``.

    >>> a, delta = with_squares(torch.ones(2, 1), torch.full((2, 1), 1e-25))
    >>> a.dtype, delta.dtype
    (torch.float64, torch.float64)
    """
    if a.dtype == delta.dtype == torch.float64:
        return a, delta
    (low, high), (least, most) = _extent(a, axes[0]), _extent(delta, axes[1])
    rows = max(a.numel(), delta.numel())
    fits = (
        _fits(low**2 * least**2, rows * high**2 * most**2)
        and _fits(low**2, rows * high**2)
        and _fits(least**2, rows * most**2)
    )
    fits = fits and a.dtype == delta.dtype
    return (a, delta) if fits else (a.double(), delta.double())


def with_square(delta: Tensor) -> Tensor:
    """Returns errors (…, units) in a dtype that holds their squares.

    >>> with_square(torch.full((2, 1), 1e-25)).dtype
    torch.float64
    """
    if delta.dtype == torch.float64:
        return delta
    least, most = _extent(delta, -1)
    return delta if _fits(least**2, delta.numel() * most**2) else delta.double()


def _fits(low: float, high: float) -> bool:
    return (low >= LOWEST or low == 0) and high <= HIGHEST


def _extent(x: Tensor, axis: int) -> tuple[float, float]:
    """The smallest and the largest of the maxima of |x| along an axis; 0 where all are 0."""
    others = [i for i in range(x.dim()) if i != axis % x.dim()]
    if not x.numel():
        return 0.0, 0.0
    # needs no copy of x, unlike abs().amax()
    largest = torch.linalg.vector_norm(x, math.inf, dim=others) if others else x.abs()
    smallest = largest.where(largest > 0, math.inf).amin()
    low, high = torch.stack([smallest, largest.amax()]).tolist()  # waits for the device
    return (low, high) if high > 0 else (0.0, 0.0)
