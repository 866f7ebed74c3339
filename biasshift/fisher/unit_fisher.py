"""The unit Fisher matrices of a layer, and the terms of Theorems 1 and 2 that follow from them."""

import math
import os
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed as dist

from biasshift.fisher import files, summary
from biasshift.fisher.all_reduce import all_reduced
from biasshift.fisher.cholesky import Factors, Singular, sherman_morrison
from biasshift.fisher.digits import MOST_MOVED, lost_errors, moved_by_rounding, out_of_range
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.refusals import (
    check_samples,
    check_summands,
    check_vectors,
    no_inverse,
    too_large,
)
from biasshift.fisher.sample_size import SAMPLES_PER_INPUT as SAMPLES_PER_INPUT
from biasshift.fisher.samples import MEMORY_BUDGET, STORAGES, ImplicitSums, TooLarge, summed
from biasshift.fisher.solver import MAX_ITERATIONS, Solver
from biasshift.theory import Scalars, Vectors, dot

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = {torch.float64: 1e-8}  # of the relative residuals; else
SINGLE_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class UnitFisher:
    """The unit Fisher matrices ``F = E_p(δ² ã ãᵀ)`` of all units of one layer, ``ã = (a, 1)``.

    Everything is a function of ``(c, μ, m, V)``: the mean squared error, the activations' mean
    under the data p and under ``q ∝ δ² p``, and their covariance under q. Make one with
    `from_samples` or `biasshift.unit_fisher`. Results have the dtype and device of the samples;
    sums and solves are float64 inside.

    A unit with ``c = 0`` is ``dead``, a live one with ``V = 0`` is ``singular``: both have NaN
    where their numbers are undefined. Where V is singular otherwise, reading an inverse quantity
    with ``damping = 0`` raises ValueError. A bias without influence is ``bias_inert``: its unit has
    no m, and the natural gradient of its weights alone.

    Source: section 3 and appendix of the ELU paper.
    """

    sums: WeightedSums | ImplicitSums = field(repr=False)
    damping: float = 0.0
    bias: bool = True
    dtype: torch.dtype = torch.float64
    name: str = ""
    # the rule that made δ²: "expected", "sampled", "empirical" (which is another matrix), or given
    labels: str = "given"
    # the variance of Σ δ² from drawing labels, (units,), float64
    label_noise: Tensor | None = field(default=None, repr=False)
    # of the relative residuals of the implicit storage; None for that of the dtype
    tolerance: float | None = None
    max_iterations: int = MAX_ITERATIONS

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, int | float) and 0 <= self.damping < math.inf):
            raise ValueError(f"'damping' must be a finite number ≥ 0, got {self.damping!r}.")
        if not (self.tolerance is None or 0 < self.tolerance < 1):
            raise ValueError(f"'tolerance' must lie in (0, 1), got {self.tolerance!r}.")
        if self.max_iterations < 1:
            raise ValueError(f"'max_iterations' must be ≥ 1, got {self.max_iterations!r}.")

    @classmethod
    def from_samples(
        cls,
        a: Tensor,
        delta2: Tensor,
        damping: float = 0.0,
        bias: bool = True,
        name: str = "",
        *,
        storage: str = "dense",
        tolerance: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        memory_budget: int = MEMORY_BUDGET,
    ) -> "UnitFisher":
        """Returns the matrices of a layer from its activations and its units' squared errors.

        Args:
            a: (samples, inputs), the incoming activations.
            delta2: (samples, units), ``δ̄² = E_y δ²`` of every example and unit, ≥ 0.
            damping: λ, relative to the mean variance of the inputs; enters the inverse quantities
                only.
            bias: whether the units have a bias to correct with.
            name: the layer's name in error messages.
            storage: ``"dense"`` keeps the blocks, ``"implicit"`` the samples, and solves by
                iteration; ``"auto"`` is dense unless the blocks would pass ``memory_budget``.
            tolerance: the relative residual of every solve by iteration, in (0, 1). By default it
                is 1e-8 in double precision and 1e-5 in single.
            max_iterations: after these, a unit that has not converged gets NaN, and a warning.
            memory_budget: bytes for blocks; with the implicit storage, for the blocks of the few
                units that are asked for.

        Raises:
            ValueError: when shapes or dtypes do not fit, or a number is negative or not finite.

        >>> a, delta2 = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> fisher = UnitFisher.from_samples(a, delta2)
        >>> fisher.mean_q, fisher.var_q, fisher.s
        (tensor([[1.]]), tensor([[[1.]]]), tensor([2.]))
        """
        if storage not in STORAGES:
            names = ", ".join(map(repr, STORAGES))
            raise ValueError(f"'storage' must be one of {names}, got {storage!r}.")
        check_samples(a, delta2)
        return cls(
            summed(a, delta2, storage, memory_budget),
            damping,
            bias,
            a.dtype,
            name,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def __add__(self, other: "UnitFisher") -> "UnitFisher":
        """The matrices of both sets of samples together, exactly."""
        if not isinstance(other, UnitFisher):
            return NotImplemented
        mine, theirs = ((f.sums.first.shape, f.damping, f.bias, f.labels) for f in (self, other))
        check_summands(mine, theirs, self.storage, other.storage)
        noise = (
            None
            if self.label_noise is None or other.label_noise is None
            else self.label_noise + other.label_noise
        )
        sums = self.sums + other.sums  # pyright: ignore[reportOperatorIssue]  of equal storage
        return replace(self, sums=sums, label_noise=noise)

    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> "UnitFisher":
        """Returns the matrices of the samples of all processes together, exactly.

        All processes must call it, and all get the same result. Nothing is approximated: the sums
        of every process move to one reference, and are added.

        Args:
            group: the processes of torch.distributed; all of them by default.

        Raises:
            RuntimeError: when torch.distributed is not initialized, or samples were not kept.
            ValueError: when the processes do not hold the same layer.
        """
        what = f"'{self.name}' at damping={self.damping}, bias={self.bias}, labels={self.labels!r}"
        sums, noise = all_reduced(self.sums, self.label_noise, what, group)
        return replace(self, sums=sums, label_noise=noise)

    def damped(self, damping: float) -> "UnitFisher":
        """Returns the same moments with another damping, which replaces the present one.

        Nothing is measured again. The sums are shared with this object, and only inverse quantities
        (s, k, k0, coupling, corrected mean, natural gradient) change.

        Raises:
            ValueError: when the damping is negative or not finite.
        """
        return replace(self, damping=damping)

    @property
    def storage(self) -> str:
        """What is kept: the blocks (``"dense"``) or the samples (``"implicit"``).

        From samples, inverse quantities come by iteration, and blocks are formed when they are
        read, within the memory budget.
        """
        return "implicit" if isinstance(self.sums, ImplicitSums) else "dense"

    # -- to look at and to keep --------------------------------------------------------------------

    def __repr__(self) -> str:
        return summary.line(self)

    def _repr_html_(self) -> str:
        return summary.page(self)

    def table(self) -> "pd.DataFrame":
        """Returns the numbers of every unit, one row each.

        Columns are ``unit``, ``mean_delta2``, ``s``, ``k``, ``k0``, ``coupling``,
        ``effective_samples``, and the flags ``dead``, ``singular``, ``bias_inert``, ``imprecise``
        and ``reliable``, which properties of these names explain.

        Raises:
            ValueError: when V has no inverse and damping is 0.
        """
        return summary.table(self)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes everything to a file, which `load` reads; a file that is there is replaced.

        The format is that of safetensors: numbers and their names, of which nothing is executed.

        Raises:
            ValueError: when the samples did not fit into memory and are read again from the probe.
        """
        files.save(self, path)

    @classmethod
    def load(
        cls, path: "str | os.PathLike[str]", device: "torch.device | str" = "cpu"
    ) -> "UnitFisher":
        """Returns what `save` has written, to the last bit, on a device.

        Raises:
            ValueError: when the file is damaged, or is not one of `save`.
        """
        return files.load(cls, path, device)

    # -- as measured -------------------------------------------------------------------------------

    @property
    def mean_delta2(self) -> Scalars:
        """``c = E_p(δ²)``, the mean squared error of every unit and the bias corner of F."""
        return self._out(self.sums.mean_delta2)

    c = mean_delta2

    @property
    def mean_p(self) -> Tensor:
        """``μ = E_p(a)``, the mean incoming activation under the data.

        It is (inputs,), or (units, inputs) where units see different inputs (grouped convolutions).
        Where weights are shared it is over all positions.
        """
        return self._out(self.sums.mean_p)

    @property
    def mean_q(self) -> Vectors:
        """``m = E_q(a)``: the mean over the examples that a unit still has an error on.

        Every example counts by its δ², so that each unit has a mean of its own. It is NaN for dead
        units, and where the bias is inert.
        """
        return self._out(self.sums.mean_q)

    @cached_property
    def var_q(self) -> Float[Tensor, "units inputs inputs"]:
        """``V = Var_q(a)``, undamped: the covariance of the incoming activations under q.

        Like `A` and `matrix` it raises ValueError where the storage is implicit and the blocks of
        all units pass the memory budget. It is NaN for dead units, and where the bias is inert.
        """
        return self._out(self._blocks(self.sums))

    @property
    def cov_p(self) -> Vectors:
        """``Cov_p(δ², a) = c (m − μ)``: why the two means differ.

        It is 0 where the size of a unit's error does not depend on its inputs; then ``k = 1``.
        """
        return self._out(self.sums.cov_p)

    @property
    def A(self) -> Float[Tensor, "units inputs inputs"]:
        """``A = E_p(δ² a aᵀ) = c (V + m mᵀ)``, the weights' block of F; 0 for a dead unit."""
        m, c = self._solvable.mean_q, self._solvable.mean_delta2
        outer = torch.baddbmm(self._blocks(self._solvable), m[:, :, None], m[:, None, :])
        return self._out((outer * c[:, None, None]).nan_to_num(nan=0.0))

    @property
    def b(self) -> Vectors:
        """``b = E_p(δ² a) = c m``, the column between weights and bias; 0 for a dead unit.

        Where it is 0, the natural gradients of bias and weights do not interact.
        """
        return self._out(self.sums.b)

    def matrix(self) -> Float[Tensor, "units params params"]:
        """Returns ``F = [[A, b], [bᵀ, c]]`` of every unit, bias last; without a bias it is A.

        It is undamped, and (units, inputs + 1, inputs + 1). For products with it use `matvec`,
        which forms no matrix in the implicit storage.

        Raises:
            ValueError: when the blocks of an implicit storage pass the memory budget.
        """
        if not self.bias:
            return self.A
        upper = torch.cat([self.A, self.b[:, :, None]], dim=2)
        lower = torch.cat([self.b, self.c[:, None]], dim=1)
        return torch.cat([upper, lower[:, None, :]], dim=1)

    def matvec(self, v: Tensor, v0: Tensor | None = None) -> tuple[Vectors, Scalars | None]:
        """Returns ``F [v; v₀]`` for every unit, undamped, without forming F.

        Args:
            v: (units, inputs), the weights' part of the vectors.
            v0: (units,), the biases' part; left out for a layer without a bias.

        Returns:
            Both parts of the product, (units, inputs) and (units,); without a bias ``(A v, None)``.

        Raises:
            ValueError: when shapes do not fit the layer.
        """
        check_vectors(self.name, self.sums, self.bias, v, v0)
        sums, wide = self._solvable, v.double()
        m = sums.mean_q.nan_to_num(nan=0.0)
        Av = sums.mean_delta2[:, None] * (
            sums.times(v.to(self.dtype)).nan_to_num(nan=0.0) + m * dot(m, wide)[:, None]
        )
        if v0 is None:
            return self._out(Av), None
        c_v0 = self.sums.mean_delta2 * v0.double()
        b_v0, b_v = m * c_v0[:, None], self.sums.mean_delta2 * dot(m, wide)
        if self.bias_inert.any():
            b = self.sums.b
            b_v0 = torch.where(self.bias_inert[:, None], b * v0.double()[:, None], b_v0)
            b_v = torch.where(self.bias_inert, dot(b, wide), b_v)
        return self._out(Av + b_v0), self._out(b_v + c_v0)

    @property
    def dead(self) -> Bool[Tensor, " units"]:
        """The units whose error is 0 on every example: for them q is undefined."""
        return self.sums.dead

    @property
    def bias_inert(self) -> Bool[Tensor, " units"]:
        """The units whose bias has no influence: what is measured of c is rounding.

        That is a bias before a softmax or a norm over positions, such as those of the keys of
        attention, with ``weight_sharing="per_example"``. The errors of an example then cancel, and
        c is rounding beside A. In the natural gradient ``Δw = A⁻¹g``, with ``A + λ mean(diag A) I``
        for A, and ``Δw₀ = 0``. NaN stand for m, V, s, k, k0, the coupling and the corrected mean.
        """
        return self.sums.bias_inert

    @cached_property
    def singular(self) -> Bool[Tensor, " units"]:
        """The live units whose incoming activations do not vary under q, up to rounding.

        Damping is relative to their variance, and cannot help them: their inverse quantities are
        NaN. Without a bias it is the matrix A that must be invertible in spite of rounding.
        """
        uncentered = isinstance(self.sums, WeightedSums) and not self.bias
        factors = self._uncentered_factors if uncentered else self._factors
        return ~(self.dead | factors.usable)

    @property
    def converged(self) -> Bool[Tensor, " units"]:
        """The units for which the solve behind s, k, k0, coupling and corrected mean converged.

        Others have NaN there although they are neither dead nor singular. With the dense storage
        every unit converges. `natural_gradient` is a solve of its own, and says so by NaN and a
        warning.
        """
        if isinstance(self.sums, WeightedSums):
            return torch.ones_like(self.dead)
        return ~(self._factors.usable & ~self.bias_inert & self._whitened_mean[0].isnan())

    @property
    def effective_samples(self) -> Scalars:
        """``(Σ δ²)² / Σ δ⁴``: how many equally weighted examples q is worth; 0 for a dead unit.

        The bias of s, k and the coupling is of order inputs / effective_samples. Below
        10 × inputs they should carry no claim; see `reliable`.
        """
        return self._out(self.sums.effective_samples)

    @property
    def reliable(self) -> Bool[Tensor, " units"]:
        """The units whose inverse quantities can carry a claim.

        They are alive, not singular, without an inert bias, not `imprecise`, and have ten effective
        samples per input or more. F is estimated without bias, but s, k, the coupling and the
        natural gradient take its inverse: of few samples, coupling and gap look larger than they
        are. Select with it before units are compared, as in ``fisher.coupling[fisher.reliable]``,
        and report the share that is left out. Damping does not enter the count of samples.
        """
        enough = self.effective_samples >= SAMPLES_PER_INPUT * self.sums.first.shape[1]
        return enough & ~(self.dead | self.singular | self.bias_inert | self.imprecise)

    @cached_property
    def imprecise(self) -> Bool[Tensor, " units"]:
        """The units whose numbers the dtype of the model cannot carry.

        Either the incoming activations vary so little beside their size that rounding them may move
        k by 0.1 or more. Or errors are near the smallest number of the dtype, and may have
        vanished; or c or s is beyond its range. Measure the model in double precision, or, in the
        first case, with more damping.
        """
        lost = lost_errors(self.sums, self.dtype)
        try:
            q, _, moved = self._whitened_mean
        except ValueError:  # no inverse without damping, and nothing to be imprecise
            return lost
        rounded = torch.finfo(self.dtype).eps * moved > MOST_MOVED
        s = (1 + q) / self.sums.mean_delta2
        return lost | rounded | out_of_range(self.sums, s, self.dtype)

    @property
    def standard_error(self) -> Scalars:
        """The standard error of ``mean_delta2`` that comes from drawing labels.

        It is estimated from the spread between draws on the same examples. It is 0 where nothing
        was drawn, and NaN for one draw, which does not show it: use ``unit_fisher(…,
        labels="sampled", draws=8)``.
        """
        if self.label_noise is not None:
            return self._out(self.label_noise.sqrt() / self.sums.examples)
        unknown = torch.nan if self.labels == "sampled" else 0.0
        return self._out(torch.full_like(self.sums.weight, unknown))

    # -- with the inverse, hence with damping ------------------------------------------------------

    @property
    def s(self) -> Scalars:
        """``s = c⁻¹ (1 + mᵀV⁻¹m)``, Theorem 1's factor of the bias update; NaN without a bias.

        It is the bias corner of ``F⁻¹``. With ``m = 0`` it is ``1/c``; a mean that is r standard
        deviations from 0 enlarges it by the factor ``1 + r²``.
        """
        return self._with_bias((1 + self._whitened_mean[0]) / self.sums.mean_delta2)

    @property
    def k(self) -> Scalars:
        """``k = 1 + (m − μ)ᵀV⁻¹m``: Theorem 2 corrects the incoming mean by ``−k m``.

        It is the published k; that of the poster is smaller by one. Any sign is possible. NaN
        without a bias.
        """
        return self._with_bias(self._k)

    @property
    def k0(self) -> Scalars:
        """``k₀ = k / c``, Theorem 2's factor of the bias gradient; NaN without a bias."""
        return self._with_bias(self._k / self.sums.mean_delta2)

    @property
    def coupling(self) -> Scalars:
        """``h = mᵀ(V + m mᵀ)⁻¹m`` in [0, 1), the coupling of bias and weights.

        It says how far the incoming activations act as a second bias, as the R² of regressing the
        constant 1 on them under q. It determines the bias update: ``s c = 1/(1 − h)``.
        """
        q = self._whitened_mean[0]
        return self._out(q / (1 + q))

    @property
    def corrected_mean(self) -> Vectors:
        """``μ − k m``, the effective incoming mean after Theorem 2's correction.

        In the bias shift of the natural gradient it takes the place of μ: ``(μ − k m)ᵀ A⁻¹ g + k₀
        g₀``. (units, inputs); NaN without a bias.
        """
        return self._with_bias(self.sums.mean_p - self._k[:, None] * self.sums.mean_q)

    def natural_gradient(
        self,
        g: Tensor,
        g0: Tensor | None = None,
        *,
        tolerance: float | None = None,
        max_iterations: int | None = None,
    ) -> tuple[Vectors, Scalars | None]:
        """Returns ``F⁻¹ (g, g₀)``, the unit natural gradient.

        In centered form it is ``Δw = (cV)⁻¹(g − g₀m)`` and ``Δw₀ = g₀/c − mᵀΔw``. The step moves
        the mean net input under q by exactly ``g₀/c``: the weights' part of it is nothing on
        average.

        Args:
            g: (units, inputs), the gradient of the weights.
            g0: (units,), the gradient of the biases; left out for a layer without a bias, which
                gets ``(A⁻¹g, None)``.
            tolerance, max_iterations: of the implicit storage, in place of those of this object.

        Returns:
            Δw (units, inputs) and Δw₀ (units,). Dead and singular units have NaN; so have, with a
            RuntimeWarning, those for which the iteration did not converge. Units with an inert bias
            have ``A⁻¹g`` and 0.

        Raises:
            ValueError: when shapes do not fit, or V has no inverse and damping is 0.

        Source: Theorem 1.
        """
        check_vectors(self.name, self.sums, self.bias, g, g0)
        effort = (tolerance or self.tolerance, max_iterations or self.max_iterations)
        c = self._solvable.mean_delta2
        if g0 is None:
            return self._out(self._solve_uncentered(g.double(), effort) / c[:, None]), None
        m, wide0 = self._solvable.mean_q, g0.double()
        dw = self._solve(g.double() - wide0[:, None] * m, self._factors, effort) / c[:, None]
        inert = self.bias_inert & self._factors.usable
        return self._out(dw), self._out((wide0 / c - dot(m, dw)).where(~inert, 0))

    # -- inside ------------------------------------------------------------------------------------

    @cached_property
    def _solvable(self) -> WeightedSums | ImplicitSums:
        return self.sums.without_inert_biases()

    @cached_property
    def _factors(self) -> Factors | Solver:
        if isinstance(self._solvable, ImplicitSums):
            return Solver(self._solvable, self.damping, self.dtype)
        return Factors(self._solvable, self.damping, self.dtype)

    @cached_property
    def _uncentered_factors(self) -> Factors:
        assert isinstance(self._solvable, WeightedSums)
        return Factors(self._solvable, self.damping, self.dtype, centered=False)

    @cached_property
    def _whitened_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """``mᵀV⁻¹m`` and ``(m − μ)ᵀV⁻¹m``, the only two numbers of a unit that s, k and h need;
        and how rounding moves k.
        """
        m = self.sums.mean_q
        x = self._solve(m, self._factors, (self.tolerance, self.max_iterations))
        # NaN where m is, for inert biases
        return dot(m, x), dot(self.sums.offset_pq, x), moved_by_rounding(self.sums, x)

    @property
    def _k(self) -> Tensor:
        return 1 + self._whitened_mean[1]

    def _solve(
        self, rhs: Tensor, factors: Factors | Solver, effort: tuple[float | None, int]
    ) -> Tensor:
        rhs, (tolerance, iterations) = rhs.nan_to_num(nan=0.0), effort
        try:
            if isinstance(factors, Factors):
                return factors.solve(rhs[:, :, None])[:, :, 0]
            tolerance = tolerance or TOLERANCE.get(self.dtype, SINGLE_TOLERANCE)
            x = factors.solve(rhs, tolerance, iterations)
        except Singular as singular:
            raise ValueError(
                no_inverse(
                    self.name,
                    self.sums,
                    self.damping,
                    singular.units,
                    self._factors.usable,
                    singular.constant_inputs,
                )
            ) from None
        failed = int((factors.usable & x.isnan().any(1)).sum())
        if failed:
            warnings.warn(
                f"Layer '{self.name}': {failed} of {len(x)} units did not converge within "
                f"{iterations} iterations at damping={self.damping}, and have NaN. Use more "
                "damping, a larger tolerance= or max_iterations=, or "
                'storage="dense" with fewer units=.',
                RuntimeWarning,
                stacklevel=3,
            )
        return x

    def _solve_uncentered(self, g: Tensor, effort: tuple[float | None, int]) -> Tensor:
        """``(W + m mᵀ)⁻¹ g``; by iteration in centered form, since a large mean would drown the
        products.
        """
        if isinstance(self.sums, WeightedSums):
            return self._solve(g, self._uncentered_factors, effort)
        return sherman_morrison(
            lambda rhs: self._solve(rhs, self._factors, effort), g, self._solvable.mean_q
        )

    def _blocks(self, sums: WeightedSums | ImplicitSums) -> Tensor:
        try:
            return sums.var_q()
        except TooLarge as large:
            raise ValueError(too_large(self.name, large.units, large.bytes)) from None

    def _with_bias(self, x: Tensor) -> Tensor:
        return self._out(x if self.bias else torch.full_like(x, torch.nan))

    def _out(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
