"""``(V + λ mean(diag V) I)⁻¹`` for all units of a layer whose samples are kept, not its blocks.

By conjugate gradients, or by factors of some units at a time where those are cheaper. Either way
the residual is then computed in float64, and what it leaves is solved for again: single precision
loses no digits of the answer.
"""

from functools import cached_property

import torch
from torch import Tensor

from biasshift.fisher.cg import ConjugateGradients, Preconditioner
from biasshift.fisher.cholesky import Singular, has_variance, rounding, variances
from biasshift.fisher.samples import ImplicitSums, Work
from biasshift.fisher.woodbury import DirectSolver, Woodbury, block_cholesky, unit_woodbury
from biasshift.precision import full_precision

MAX_ITERATIONS = 1000
TYPICAL = 100  # iterations, to compare costs with
VECTOR_BYTES = 2**28  # that the vectors of all units solved together may take
RANGE = 2.0**-80  # of variances and their sums, that iterations in single precision can work with
CYCLES = 8  # solves in a row, each for the residual of the last


class Solver:
    """The solver of one layer at one damping; its preconditioner or Gram matrix is made once.

    Args:
        sums: the sums of the layer.
        damping: λ ≥ 0, relative to the mean variance of every unit.
        dtype: that of the samples, and of the iterations; at least float32.

    Attributes:
        usable: (units,) bool, the live units whose activations vary under q.
    """

    def __init__(self, sums: ImplicitSums, damping: float, dtype: torch.dtype):
        self.sums, self.damping = sums, damping
        self._variances = variances(sums)
        self.dtype = torch.promote_types(dtype, torch.float32)
        if not _fits_single(sums, self._variances):
            self.dtype = torch.float64
        self.usable = (sums.weight > 0) & has_variance(self._variances, sums.offset_q, dtype)

    def solve(self, rhs: Tensor, tolerance: float, max_iterations: int) -> Tensor:
        """Returns ``W⁻¹ rhs``, float64; NaN for units not usable, or not converged.

        Args:
            rhs: (units, inputs).
            tolerance: of the relative residual, ``|W x − rhs| ≤ tolerance |rhs|`` for every unit.
            max_iterations: in all; a solve by factors counts as one.

        Raises:
            Singular: when W certainly has no inverse, without damping.
        """
        self._refuse_singular()
        x = torch.full_like(rhs, torch.nan, dtype=torch.float64)
        index = self.usable.nonzero().flatten()
        if len(index):
            with full_precision([rhs.device.type]), torch.no_grad():
                for units in index.split(self._chunk_size()):
                    x[units] = self._refined(units, rhs[units].double(), tolerance, max_iterations)
        return x

    def _chunk_size(self) -> int:
        """How many units are solved for together."""
        # Parts that are read again for every product serve all units at once.
        if any(part.terms == "unread" for part in self.sums.parts):
            return len(self.sums.weight)
        itemsize = torch.finfo(self.dtype).bits // 8
        return max(1, VECTOR_BYTES // (self.sums.first.shape[1] * (6 * itemsize + 24)))

    def _refuse_singular(self) -> None:
        if self.damping > 0 or not self.usable.any():
            return
        constant = self._variances <= rounding(self.dtype) * self.sums.squares_q
        few = self.usable & (constant.any(1) | (self.sums.positions < constant.shape[1]))
        if few.any():
            raise Singular(
                int(few.sum()), constant[self.usable].all(0).nonzero().flatten().tolist()
            )

    def _refined(self, units: Tensor, b: Tensor, tolerance: float, iterations: int) -> Tensor:
        """Units whose residual a solve has not even halved are given up."""
        sums = self.sums if len(units) == len(self.sums.weight) else self.sums.select(units)
        ridge, x = self.damping * self._variances[units].mean(1), torch.zeros_like(b)
        left = b.norm(dim=1)  # the norms of the residuals
        goal = tolerance * left
        waiting = (left > 0).nonzero().flatten()
        r = b[waiting]
        for _ in range(CYCLES):
            if not len(waiting) or iterations <= 0:
                break
            own = sums if len(waiting) == len(b) else sums.select(waiting)
            step, used = self._solved(
                own, units[waiting], r, goal[waiting], ridge[waiting], iterations
            )
            iterations -= used
            x[waiting] += step
            r = b[waiting] - own.times(x[waiting]) - ridge[waiting, None] * x[waiting]
            before, now = left[waiting], r.norm(dim=1)
            left[waiting] = now
            goal[waiting] = goal[waiting].maximum(self._rounding(units[waiting], x[waiting]))
            more = (now > goal[waiting]) & (now < 0.5 * before)
            waiting, r = waiting[more], r[more]
        return x.where((left <= goal)[:, None], torch.nan)

    def _rounding(self, units: Tensor, x: Tensor) -> Tensor:
        """The residual of the exact solution in float64: a bound on ``|W|`` times ``|x|`` times the
        last digit.
        """
        trace = (1 + self.damping) * self._variances[units].sum(1)
        return 4 * torch.finfo(torch.float64).eps * trace * x.norm(dim=1)

    def _solved(
        self, sums: ImplicitSums, units: Tensor, r: Tensor, goal: Tensor, ridge: Tensor, most: int
    ) -> tuple[Tensor, int]:
        if isinstance(self._method, ConjugateGradients):
            return self._method.solve(sums, r, goal, ridge, self._variances[units], most)
        return self._method(sums, r, ridge), 1

    @cached_property
    def _method(self) -> ConjugateGradients | DirectSolver:
        """The cheapest, by operations for one unit; those in float64 count twice."""
        inputs = self.sums.first.shape[1]
        terms = {part.terms for part in self.sums.parts}
        work = sum((part.work for part in self.sums.parts), Work())
        iterating = TYPICAL * (4 * work.positions * inputs + 20 * work.errors)
        forming = 2 * work.errors * inputs
        factoring = 2 * min(work.rows, inputs) ** 3 / 3
        if terms == {"samples"}:
            if work.rows < inputs and factoring < iterating:
                return Woodbury(self.sums).solve
        elif terms == {"examples"} and work.rows < inputs:
            if forming + 4 * work.rows**2 * inputs + factoring < iterating:
                return unit_woodbury
        elif terms <= {"examples", "positions"}:
            if forming + 2 * work.rows * inputs**2 + factoring < iterating:
                return block_cholesky
        preconditioner = Preconditioner(self.sums, self.usable, self.damping, self.dtype)
        return ConjugateGradients(preconditioner, self.dtype)


def _fits_single(sums: ImplicitSums, variance: Tensor) -> bool:
    """Whether vectors, and products with ``Σ δ² a aᵀ``, stay in the range of single precision."""
    varying = variance[variance > 0]
    if not len(varying):
        return True
    weight = sums.weight[sums.weight > 0]
    extent = torch.stack([varying.min(), varying.max(), weight.min(), weight.max()])
    low, high, least, most = extent.tolist()
    return min(low, low * least) > RANGE and max(high, high * most) < 1 / RANGE
