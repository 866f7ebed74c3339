"""What the unit Fisher matrices of a layer are as measured: moments, blocks, and products."""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.refusals import check_vectors, too_large
from biasshift.fisher.samples import ImplicitSums, TooLarge
from biasshift.theory import Scalars, Vectors, dot


class Expectations:
    """The part of a `unit_fisher.UnitFisher` that takes no inverse, hence knows no damping."""

    sums: WeightedSums | ImplicitSums
    bias: bool
    dtype: torch.dtype
    name: str
    labels: str
    label_noise: Tensor | None

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
        return self._blocks(lambda: self.sums.covariance(self.dtype))

    @property
    def cov_p(self) -> Vectors:
        """``Cov_p(δ², a) = c (m − μ)``: why the two means differ.

        It is 0 where the size of a unit's error does not depend on its inputs; then ``k = 1``.
        """
        return self._out(self.sums.cov_p)

    @property
    def A(self) -> Float[Tensor, "units inputs inputs"]:
        """``A = E_p(δ² a aᵀ) = c (V + m mᵀ)``, the weights' block of F; 0 for a dead unit."""
        return self._blocks(lambda: self.sums.matrix(self.dtype, bias=False))

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
        return self._blocks(lambda: self.sums.matrix(self.dtype, self.bias))

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

    @property
    def effective_samples(self) -> Scalars:
        """``(Σ δ²)² / Σ δ⁴``: how many equally weighted examples q is worth; 0 for a dead unit.

        The bias of s, k and the coupling is of order inputs / effective_samples. Below
        10 × inputs they should carry no claim; see `reliable`.
        """
        return self._out(self.sums.effective_samples)

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

    # -- inside ------------------------------------------------------------------------------------

    @cached_property
    def _solvable(self) -> WeightedSums | ImplicitSums:
        return self.sums.without_inert_biases()

    def _blocks(self, finished: Callable[[], Tensor]) -> Tensor:
        try:
            return finished()
        except TooLarge as large:
            raise ValueError(too_large(self.name, large.units, large.bytes)) from None

    def _with_bias(self, x: Tensor) -> Tensor:
        return self._out(x if self.bias else torch.full_like(x, torch.nan))

    def _out(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
