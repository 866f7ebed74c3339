"""``(V + λ mean(diag V) I)⁻¹`` for all units of a layer whose samples are kept, not its blocks.

By conjugate gradients, or by factors of some units at a time where those are cheaper. Either way
the residual is then computed in float64, and what it leaves is solved for again: single precision
loses no digits of the answer.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from biasshift.fisher.cg import ConjugateGradients, Preconditioner
from biasshift.fisher.cholesky import Factors, Singular, has_variance, rounding, variances
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.samples import ImplicitSums, Work
from biasshift.fisher.woodbury import DirectSolver, Woodbury, block_cholesky, unit_woodbury
from biasshift.precision import full_precision

MAX_ITERATIONS = 1000
TYPICAL = 100  # iterations, to compare costs with
VECTOR_BYTES = 2**28  # that the vectors of all units solved together may take
RANGE = 2.0**-80  # of variances and their sums, that iterations in single precision can work with
EXACT = 60  # iterations of an `ExactSolver`, to compare costs with
MOST_ITERATIONS = 2 * EXACT  # before factors take over
SAFE = 4  # times as cheap as factors, an iteration must seem to be
# Below this damping per sample and float64 digit, no Gram matrix is safely positive definite.
LEAST = 1e4 * torch.finfo(torch.float64).eps
CYCLES = 8  # solves in a row, each for the residual of the last


class Solver:
    """The solver of one layer at one damping; its preconditioner or Gram matrix is made once.

    Args:
        sums: the sums of the layer.
        damping: λ ≥ 0, relative to the mean variance of every unit.
        dtype: that of the samples, and of the iterations; at least float32.

    Attributes:
        alive: (units,) bool, the live units whose activations vary under q.
    """

    def __init__(self, sums: ImplicitSums, damping: float, dtype: torch.dtype):
        self.sums, self.damping = sums, damping
        self._variances = variances(sums)
        self.dtype = torch.promote_types(dtype, torch.float32)
        if not _fits_single(sums, self._variances):
            self.dtype = torch.float64
        self.alive = (sums.weight > 0) & has_variance(self._variances, sums.offset_q, dtype)

    @property
    def usable(self) -> Tensor:
        """The units that a solve gives an answer for, if it converges, (units,) bool."""
        return self.alive

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
        index = self.alive.nonzero().flatten()
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
        if self.damping > 0 or not self.alive.any():
            return
        constant = self._variances <= rounding(self.dtype) * self.sums.squares_q
        few = self.alive & (constant.any(1) | (self.sums.positions < constant.shape[1]))
        if few.any():
            raise Singular(int(few.sum()), constant[self.alive].all(0).nonzero().flatten().tolist())

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
        preconditioner = Preconditioner(self.sums, self.alive, self.damping, self.dtype)
        return ConjugateGradients(preconditioner, self.dtype)


class ExactSolver(Solver):
    """The solver of one layer whose samples are held, as exact as with blocks, at one damping.

    It takes the Gram matrix of the samples where they are fewer than inputs, Cholesky factors of
    the blocks, or conjugate gradients, by predicted cost. An iteration ends where its residual is
    what rounding the samples would leave, ``|W x − b| ≤ ε |W| |x|`` with ε of their dtype: then x
    solves, exactly, a problem that the samples cannot tell from theirs. Blocks of products in that
    dtype are no nearer. Where an iteration does not get there, factors do.

    Args:
        sums: the sums of the layer, whose parts are all `Samples`, or all `ExampleVectors`.
        blocks: returns the same sums with blocks.
        damping: λ ≥ 0, relative to the mean variance of every unit.
        dtype: that of the samples.
    """

    def __init__(
        self,
        sums: ImplicitSums,
        damping: float,
        dtype: torch.dtype,
        blocks: Callable[[], WeightedSums],
    ):
        super().__init__(sums, damping, dtype)
        self._own, self._blocks = dtype, blocks
        self._digit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self._by_blocks = self._way == "blocks"

    @cached_property
    def _factors(self) -> Factors:
        return Factors(self._blocks(), self.damping, self._own)

    @property
    def usable(self) -> Tensor:
        """The units that a solve gives an answer for, (units,) bool."""
        return self._factors.usable if self._by_blocks else self.alive

    def solve(self, rhs: Tensor, tolerance: float = 0.0, max_iterations: int = 0) -> Tensor:
        """Returns ``W⁻¹ rhs``, float64; NaN for units not usable.

        Args:
            rhs: (units, inputs).
            tolerance, max_iterations: not used; the result is as exact as the samples.

        Raises:
            Singular: when W has no inverse, without damping.
        """
        inputs = self.sums.first.shape[1]
        if self.damping == 0 and self._work.rows <= inputs and self.alive.any():
            constant = (self._variances[self.alive] <= 0).all(0)
            raise Singular(int(self.alive.sum()), constant.nonzero().flatten().tolist())
        if not self._by_blocks:
            x = super().solve(rhs, 0.0, MOST_ITERATIONS)
            if not (self.alive & x.isnan().any(1)).any():
                return x
            self._by_blocks = True
        return self._factors.solve(rhs[:, :, None])[:, :, 0]

    @property
    def by_gram(self) -> bool:
        """Whether solves are by the Gram matrix, in float64 throughout."""
        return self._way == "gram"

    def _refuse_singular(self) -> None:
        pass  # without damping, factors of blocks tell

    def _rounding(self, units: Tensor, x: Tensor) -> Tensor:
        """``ε |W| |x|``, with the largest variance for a bound from below on the norm of W."""
        of_samples = self._digit * self._variances[units].amax(1) * x.norm(dim=1)
        return torch.maximum(super()._rounding(units, x), of_samples)

    @cached_property
    def _work(self) -> Work:
        return sum((part.work for part in self.sums.parts), Work())

    @property
    def _has_own_rows(self) -> bool:
        """Whether every unit has rows of its own, since weights are shared."""
        return any(part.terms == "examples" for part in self.sums.parts)

    @cached_property
    def _way(self) -> str:
        """The cheapest, in operations of a float32 product for one unit.

        The constants were measured on a CPU: float64 counts twice, small factorizations run at a
        third of the rate of products, and a pass over a matrix costs as much as 500 products of its
        elements.
        """
        units, inputs = self.sums.first.shape
        rows = self._work.rows
        if self.damping == 0:
            return "blocks"
        double = self.dtype == torch.float64
        ways = {"blocks": (1.0 + double) * rows * inputs**2 + 1000 * inputs**2 + 3 * inputs**3}
        if rows < inputs and self.damping > LEAST * rows:
            ways["gram"] = 4 * rows**3 + 500 * rows**2
            # every unit has a Gram matrix of its own, which is formed in float64
            ways["gram"] += (4 * rows**2 + 1000 * rows) * inputs * self._has_own_rows
        if self._has_own_rows:  # fewer than half of the inputs: it would take as many iterations
            return min(ways, key=lambda way: ways[way])
        step = 4 * rows * inputs + 20 * rows + 60 * inputs
        shared = (rows * inputs**2 + 5 * inputs**3) / units
        ways["iteration"] = SAFE * ((1 + 3 * double) * EXACT * step + shared)
        return min(ways, key=lambda way: ways[way])

    @cached_property
    def _method(self) -> ConjugateGradients | DirectSolver:
        if self._way == "gram":
            return unit_woodbury if self._has_own_rows else Woodbury(self.sums).solve
        preconditioner = Preconditioner(self.sums, self.alive, self.damping, self.dtype)
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
