"""``(V + λ mean(diag V) I)⁻¹`` applied to vectors for all units of a layer whose samples are kept
in place of their blocks.

By conjugate gradients, or by factors of some units at a time where those are cheaper. Either way
the residual is then computed in float64, and what it leaves is solved for again: single precision
loses no digits of the answer.
"""

from functools import cached_property

import torch
from torch import Tensor

from biasshift.fisher.cg import ConjugateGradients, Preconditioner
from biasshift.fisher.cholesky import Singular, rounding, variances, without_variance
from biasshift.fisher.convolution import Maps
from biasshift.fisher.samples import ImplicitSums, Samples, Work
from biasshift.fisher.woodbury import Blocks, Rows, Woodbury
from biasshift.precision import full_precision

TYPICAL = 100  # iterations, to compare costs with
VECTORS = 2**28  # bytes that the vectors of all units solved together may take
CYCLES = 8  # solves in a row, each for the residual of the last


class Solver:
    """The solver of one layer at one damping. Residuals are relative: ``|W x − b| ≤ tolerance |b|``
    for every unit.
    """

    def __init__(self, sums: ImplicitSums, damping: float, dtype: torch.dtype):
        self.sums, self.damping, self.dtype = (
            sums,
            damping,
            torch.promote_types(dtype, torch.float32),
        )
        self.usable = (sums.weight > 0) & ~without_variance(sums, dtype)
        self._variances = variances(sums)

    def solve(self, rhs: Tensor, tolerance: float, max_iterations: int) -> Tensor:
        """``W⁻¹ rhs`` for (units, inputs), float64; NaN for units that are not usable or have not
        converged.

        Raises:
            Singular: when W certainly has no inverse, without damping.
        """
        self._refuse_singular()
        x = torch.full_like(rhs, torch.nan, dtype=torch.float64)
        index = self.usable.nonzero().flatten()
        if len(index):
            with full_precision([rhs.device.type]), torch.no_grad():
                for units in index.split(self._together()):
                    x[units] = self._refined(units, rhs[units].double(), tolerance, max_iterations)
        return x

    def _together(self) -> int:
        if any(
            part.bytes == 0 for part in self.sums.parts
        ):  # read again for every product: all units at once
            return len(self.sums.weight)
        itemsize = torch.finfo(self.dtype).bits // 8
        return max(1, VECTORS // (self.sums.first.shape[1] * (6 * itemsize + 24)))

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
        ridge, left, x = (
            self.damping * self._variances[units].mean(1),
            b.norm(dim=1),
            torch.zeros_like(b),
        )
        goal = tolerance * left
        waiting = (left > 0).nonzero().flatten()
        r = b[waiting]
        for _ in range(CYCLES):
            if not len(waiting) or iterations <= 0:
                break
            some = sums if len(waiting) == len(b) else sums.select(waiting)
            step, used = self._solved(
                some, units[waiting], r, goal[waiting], ridge[waiting], iterations
            )
            iterations -= used
            x[waiting] += step
            r = b[waiting] - some.times(x[waiting]) - ridge[waiting, None] * x[waiting]
            before, now = left[waiting], r.norm(dim=1)
            left[waiting], goal[waiting] = (
                now,
                goal[waiting].maximum(self._rounding(units[waiting], x[waiting])),
            )
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
        return self._method.solve(sums, r, ridge), 1

    @cached_property
    def _method(self) -> Woodbury | Rows | Blocks | ConjugateGradients:
        """The cheapest, by operations for one unit; those in float64 count twice."""
        inputs, parts = self.sums.first.shape[1], self.sums.parts
        work = sum((part.work for part in parts), Work(0, 0, 0))
        iterating = TYPICAL * (4 * work.positions * inputs + 20 * work.errors)
        factor = 2 * min(work.rows, inputs) ** 3 / 3
        if all(isinstance(part, Samples) for part in parts):
            if work.rows < inputs and factor < iterating:
                return Woodbury(self.sums)
        elif all(isinstance(part, Maps) for part in parts):
            forming = 2 * work.errors * inputs
            if work.rows < inputs and not any(
                part.squared for part in parts if isinstance(part, Maps)
            ):
                if forming + 4 * work.rows**2 * inputs + factor < iterating:
                    return Rows()
            elif forming + 2 * work.rows * inputs**2 + factor < iterating:
                return Blocks()
        return ConjugateGradients(
            Preconditioner(self.sums, self.usable, self.damping, self.dtype), self.dtype
        )
