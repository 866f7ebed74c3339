"""``(V + λ mean(diag V) I)⁻¹`` applied to vectors, for all units of a layer, with an answer for
every singular case.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from biasshift.fisher.moments import Sums, WeightedSums
from biasshift.theory import damp

FACTOR_BYTES = (
    2**28
)  # Cholesky factors are kept for the next solve up to this size, and formed in pieces of it beyond


class Singular(Exception):
    """The covariance of some units has no inverse at this damping."""

    def __init__(self, units: int, constant_inputs: list[int]):
        super().__init__(units, constant_inputs)
        self.units, self.constant_inputs = units, constant_inputs


def variances(sums: Sums) -> Tensor:
    """diag V, (units, inputs), without forming V."""
    return (sums.squares_q - sums.offset_q**2).clamp(min=0)


def rounding(dtype: torch.dtype) -> float:
    """Below this share of a second moment a variance is rounding: the samples' own precision, not
    that of the sums.
    """
    return 100 * torch.finfo(dtype).eps


def without_variance(sums: Sums, dtype: torch.dtype) -> Tensor:
    """(units,): live units whose q sits on one point, V = 0 up to rounding. Relative damping cannot
    help them.
    """
    variance = variances(sums).sum(1)
    scale = variance + (sums.offset_q**2).sum(1)
    return (sums.weight > 0) & (variance <= rounding(dtype) * scale)


def checked_cholesky(W: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the Cholesky factors of matrices, and which of the matrices have none.

    Args:
        W: (blocks, inputs, inputs), damped already.
        damping: Without damping, a pivot that is rounding makes a matrix singular, too.
        dtype: Of the samples, whose rounding W carries.

    Returns:
        The factors, (blocks, inputs, inputs), and ``failed``, (blocks,) bool; a failed factor is
        not to be used.
    """
    factors, info = torch.linalg.cholesky_ex(W)
    failed = info > 0
    if damping == 0:
        # A pivot is what the inputs before this one leave unexplained of it: where it is rounding,
        # nothing is left.
        pivots = factors.diagonal(dim1=1, dim2=2).square()
        least = W.shape[-1] * torch.finfo(dtype).eps * W.diagonal(dim1=1, dim2=2)
        failed |= (pivots <= least).any(1)
    return factors, failed


class Factors:
    """Cholesky factors of the damped covariances of all units (or of ``A / c`` with
    ``centered=False``), made when needed.

    A unit is usable when it is alive, has some variance, and, with damping, when its matrix is
    positive definite in spite of
    rounding: a unit whose q sits on hardly more than one sample may have less variance than its
        samples have digits.
    """

    def __init__(
        self, sums: WeightedSums, damping: float, dtype: torch.dtype, centered: bool = True
    ):
        self.sums, self.damping, self.dtype, self.centered = sums, damping, dtype, centered
        self.units, self.inputs = sums.first.shape
        self._usable = (sums.weight > 0) & ~without_variance(sums, dtype)
        self._step = max(1, FACTOR_BYTES // (8 * self.inputs**2))
        self._kept: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def _chunks(self) -> Iterator[slice]:
        return (slice(i, i + self._step) for i in range(0, self.units, self._step))

    @property
    def usable(self) -> Tensor:
        """(units,) bool. Factors everything once if there is damping; without, only units without
        variance are left out.
        """
        for units in self._chunks():
            if self.damping > 0 and units.start not in self._seen:
                self._factor(units)
        return self._usable

    def solve(self, rhs: Tensor) -> Tensor:
        """``W⁻¹ rhs`` for (units, inputs, sides), float64; NaN for units that are not usable.

        Raises:
            Singular: when a live unit's matrix has no inverse and there is no damping.
        """
        x = torch.empty_like(rhs)
        for units in self._chunks():
            x[units] = torch.cholesky_solve(rhs[units], self._factor(units))
        x[~self._usable] = torch.nan
        return x

    def _factor(self, units: slice) -> Tensor:
        if units.start in self._kept:
            return self._kept[units.start]
        W = self._matrices(units)
        factor, failed = checked_cholesky(W, self.damping, self.dtype)
        if self.damping == 0:
            if failed.any():
                raise Singular(
                    int(failed.sum()),
                    (variances(self.sums)[self._usable] <= 0).all(0).nonzero().flatten().tolist(),
                )
        elif failed.any():
            factor[failed] = torch.eye(self.inputs, dtype=W.dtype, device=W.device)
            self._usable[units] &= ~failed
        self._seen.add(units.start)
        if self.units <= self._step:
            self._kept[units.start] = factor
        return factor

    def _matrices(self, units: slice) -> Tensor:
        W = self.sums.var_q(units)
        W[~self._usable[units]] = torch.eye(self.inputs, dtype=W.dtype, device=W.device)
        W = damp(W, self.damping) if self.damping > 0 else W
        if self.centered:
            return W
        m = self.sums.mean_q[units].nan_to_num(nan=0.0)
        return torch.baddbmm(W, m[:, :, None], m[:, None, :])
