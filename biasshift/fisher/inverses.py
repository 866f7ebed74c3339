"""What is read of a layer by solving with ``V + λ mean(diag V) I``: the terms of the theorems.

Blocks are solved with by Cholesky factors, samples by iteration or by whatever is cheapest. All is
made at the first reading, and kept.
"""

import warnings
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from biasshift.fisher.cholesky import Factors, Singular, sherman_morrison
from biasshift.fisher.digits import (
    MOST_MOVED,
    cancelled,
    lost_errors,
    moved_by_rounding,
    out_of_range,
)
from biasshift.fisher.expectations import Expectations
from biasshift.fisher.held import HeldSums
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.refusals import check_vectors, no_inverse
from biasshift.fisher.sample_size import SAMPLES_PER_INPUT
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.solver import ExactSolver, Solver
from biasshift.theory import Scalars, Vectors, dot

TOLERANCE = {torch.float64: 1e-8}  # of the relative residuals; else
SINGLE_TOLERANCE = 1e-5


class Inverses(Expectations):
    """The part of a `unit_fisher.UnitFisher` that takes an inverse, hence depends on damping."""

    damping: float
    tolerance: float | None
    max_iterations: int

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

    # -- the units that they hold for --------------------------------------------------------------

    @cached_property
    def singular(self) -> Bool[Tensor, " units"]:
        """The live units whose incoming activations do not vary under q, up to rounding.

        Damping is relative to their variance, and cannot help them: their inverse quantities are
        NaN. Without a bias it is the matrix A that must be invertible in spite of rounding.
        """
        uncentered = self._in_blocks is not None and not self.bias
        factors = self._uncentered_factors if uncentered else self._factors
        return ~(self.dead | factors.usable)

    @property
    def converged(self) -> Bool[Tensor, " units"]:
        """The units for which the solve behind s, k, k0, coupling and corrected mean converged.

        Others have NaN there although they are neither dead nor singular; that is possible with the
        implicit storage alone. `natural_gradient` is a solve of its own, and says so by NaN and a
        warning.
        """
        if isinstance(self.sums, WeightedSums | HeldSums):
            return torch.ones_like(self.dead)
        return ~(self._factors.usable & ~self.bias_inert & self._whitened_mean[0].isnan())

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
        k by 0.1 or more. Or nearly all weight is on samples near 0 and far from the mean of all, so
        that moments cancel. Or errors are near the smallest number of the dtype, and may have
        vanished; or c or s is beyond its range. Measure the model in double precision, or, in the
        first case, with more damping.
        """
        lost = lost_errors(self.sums, self.dtype) | cancelled(self.sums, self.dtype)
        try:
            q, _, moved = self._whitened_mean
        except ValueError:  # no inverse without damping, and nothing to be imprecise
            return lost
        rounded = torch.finfo(self.dtype).eps * moved > MOST_MOVED
        s = (1 + q) / self.sums.mean_delta2
        return lost | rounded | out_of_range(self.sums, s, self.dtype)

    # -- inside ------------------------------------------------------------------------------------

    @cached_property
    def _factors(self) -> Factors | Solver:
        if isinstance(self._solvable, HeldSums):
            held = self._solvable
            return ExactSolver(held, self.damping, self.dtype, lambda: held.formed)
        if isinstance(self._solvable, ImplicitSums):
            return Solver(self._solvable, self.damping, self.dtype)
        return Factors(self._solvable, self.damping, self.dtype)

    @cached_property
    def _uncentered_factors(self) -> Factors:
        assert self._in_blocks is not None
        return Factors(self._in_blocks, self.damping, self.dtype, centered=False)

    @cached_property
    def _in_blocks(self) -> WeightedSums | None:
        """The sums with blocks, which a layer without a bias is solved with where there may be any.

        The Gram matrix of samples serves it as well; iterations end too early for it.
        """
        if isinstance(self._solvable, HeldSums):
            assert isinstance(self._factors, ExactSolver)
            return None if self._factors.by_gram else self._solvable.formed
        return self._solvable if isinstance(self._solvable, WeightedSums) else None

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
        if self._in_blocks is not None:
            return self._solve(g, self._uncentered_factors, effort)
        return sherman_morrison(
            lambda rhs: self._solve(rhs, self._factors, effort), g, self._solvable.mean_q
        )
