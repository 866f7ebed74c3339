"""``(V + λ mean(diag V) I)⁻¹`` by Cholesky factors, with an answer for every singular case.

`factorize` and `has_variance` decide for one batch of matrices which of them can be solved with;
`Factors` is the solver of a whole layer whose blocks are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from biasshift.fisher.moments import Sums, WeightedSums
from biasshift.fisher.triangles import solved
from biasshift.theory import damp, dot

# Factors are kept for the next solve up to this size, and formed in pieces of it beyond.
FACTOR_BYTES = 2**28


@dataclass(eq=False)
class Singular(Exception):
    """The covariance of so many units has no inverse at this damping."""

    units: int
    constant_inputs: list[int]  # that vary under no unit's q


def variances(sums: Sums) -> Tensor:
    """Returns diag V, (units, inputs), without forming V; NaN for dead units."""
    return (sums.squares_q - sums.offset_q**2).clamp(min=0)


def rounding(dtype: torch.dtype) -> float:
    """Returns the share of a second moment below which a variance is rounding.

    It is that of the samples' own dtype: the sums are float64, and round less.
    """
    return 100 * torch.finfo(dtype).eps


def has_variance(variances: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns which matrices are more than rounding; relative damping helps no others.

    A unit whose q sits on one point has ``V = 0``. What is measured of it is the rounding of the
    second moment about the reference.

    Args:
        variances: diag V, (units, inputs), ≥ 0.
        offset: mean − reference, (units, inputs).
        dtype: that of the samples.

    >>> offset = torch.tensor([[1.0], [1.0]])
    >>> has_variance(torch.tensor([[0.5], [1e-6]]), offset, torch.float32)
    tensor([ True, False])
    """
    variance = variances.sum(1)
    return variance > rounding(dtype) * (variance + offset.square().sum(1))


def factorize(W: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns lower Cholesky factors of symmetric matrices, and which of them have failed.

    Without damping, a matrix also fails where a pivot is rounding: a pivot is what the inputs
    before leave unexplained of this one. With damping every pivot is at least the ridge, and only
    a matrix that rounding has made indefinite fails.

    Args:
        W: (units, inputs, inputs), damped already.
        damping: the damping that W has; only whether it is 0 matters.
        dtype: that of the samples, whose precision bounds a pivot.

    Returns:
        Factors (units, inputs, inputs), undefined where they have failed, and (units,) bool.

    >>> _, failed = factorize(torch.ones(1, 2, 2), 0.0, torch.float32)
    >>> failed
    tensor([True])
    """
    factors, info = torch.linalg.cholesky_ex(W)
    failed = info > 0
    if damping == 0:
        pivots = factors.diagonal(dim1=1, dim2=2).square()
        smallest = W.shape[-1] * torch.finfo(dtype).eps * W.diagonal(dim1=1, dim2=2)
        failed |= (pivots <= smallest).any(1)
    return factors, failed


def sherman_morrison(solve: Callable[[Tensor], Tensor], rhs: Tensor, m: Tensor) -> Tensor:
    """Returns ``(W + m mᵀ)⁻¹ rhs`` by a solver for W, for every unit.

    With ``x = W⁻¹ rhs`` and ``y = W⁻¹ m`` it is ``x − y (mᵀx) / (1 + mᵀy)``. This is how a layer
    without a bias is solved where its matrix is not formed: a large mean would drown the products
    with it.

    Args:
        solve: from (units, inputs) to ``W⁻¹`` times it; called for rhs, then for m.
        rhs: (units, inputs).
        m: (units, inputs).

    >>> sherman_morrison(lambda v: v / 2, torch.tensor([[4.0]]), torch.tensor([[1.0]]))
    tensor([[1.3333]])
    """
    x, y = solve(rhs), solve(m)
    return x - y * (dot(m, x) / (1 + dot(m, y)))[:, None]


class Factors:
    """Cholesky factors of the damped covariances of all units of a layer, made when needed.

    With ``centered=False`` they are those of ``A / c``. A unit is usable when it is alive, has some
    variance, and, with damping, when its matrix is positive definite in spite of rounding. A unit
    whose q sits on hardly more than one sample may have less variance than its samples have digits.

    Args:
        sums: the sums of the layer.
        damping: λ ≥ 0, relative to the mean variance of every unit.
        dtype: that of the samples, whose rounding is no variance.
        centered: whether V is factored, or ``V + m mᵀ``, both damped alike.
    """

    def __init__(
        self, sums: WeightedSums, damping: float, dtype: torch.dtype, centered: bool = True
    ):
        self.sums, self.damping, self.dtype, self.centered = sums, damping, dtype, centered
        self.units, self.inputs = sums.first.shape
        self._usable = (sums.weight > 0) & has_variance(variances(sums), sums.offset_q, dtype)
        self._step = max(1, FACTOR_BYTES // (8 * self.inputs**2))
        # By the first unit of a chunk; None where it was factored, and is too large to keep.
        self._factors: dict[int, Tensor | None] = {}

    def _chunks(self) -> Iterator[slice]:
        return (slice(i, i + self._step) for i in range(0, self.units, self._step))

    @property
    def usable(self) -> Tensor:
        """The units that a solve gives an answer for, (units,) bool.

        Factors everything once if there is damping; without, only units without variance are left
        out, and a solve raises for the others that are singular.
        """
        for units in self._chunks():
            if self.damping > 0 and units.start not in self._factors:
                self._factor(units)
        return self._usable

    def solve(self, rhs: Tensor) -> Tensor:
        """Returns ``W⁻¹ rhs`` for (units, inputs, sides), float64; NaN for units not usable.

        Factors of all units are kept for the next call, if they fit into `FACTOR_BYTES`. Larger
        layers are factored anew, a few units at a time.

        Raises:
            Singular: when a live unit's matrix has no inverse and there is no damping.
        """
        x = torch.empty_like(rhs)
        for units in self._chunks():
            x[units] = solved(self._factor(units), rhs[units])
        x[~self._usable] = torch.nan
        return x

    def _factor(self, units: slice) -> Tensor:
        kept = self._factors.get(units.start)
        if kept is not None:
            return kept
        factor, failed = factorize(self._matrices(units), self.damping, self.dtype)
        if failed.any():
            if self.damping == 0:
                constant = (variances(self.sums)[self._usable] <= 0).all(0)
                raise Singular(int(failed.sum()), constant.nonzero().flatten().tolist())
            factor[failed] = torch.eye(self.inputs, dtype=factor.dtype, device=factor.device)
            self._usable[units] &= ~failed
        self._factors[units.start] = factor if self.units <= self._step else None
        return factor

    def _matrices(self, units: slice) -> Tensor:
        W = self.sums.var_q(units)
        W[~self._usable[units]] = torch.eye(self.inputs, dtype=W.dtype, device=W.device)
        W = damp(W, self.damping) if self.damping > 0 else W
        if self.centered:
            return W
        m = self.sums.mean_q[units].nan_to_num(nan=0.0)
        return torch.baddbmm(W, m[:, :, None], m[:, None, :])
