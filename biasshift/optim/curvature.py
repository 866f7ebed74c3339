"""The curvature of one layer, and what it makes of the layer's gradient.

`Curvature` forms ``W`` from running sums: a diagonal or a matrix for every block of units. Layers
too large for matrices keep their latest examples, and `ExampleSolver` solves with those.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from biasshift.fisher.cholesky import has_variance, rounding
from biasshift.optim import triangle
from biasshift.optim.example_solver import ExampleSolver, no_inverse
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.triangle import units_at_a_time
from biasshift.optim.update_rule import UpdateRule
from biasshift.theory import dot

CACHED = 2**21  # bytes of the matrices that are formed and factored together
# The bound of the relative error that float32 factors may bring into the step of a float32 model.
# On matrices with one large eigenvalue, few examples or decaying spectra the error itself was five
# to ten times smaller. They are read twice as fast.
FLOAT32_ERROR = 0.05


class Moments(NamedTuple):
    """First moments of the incoming activations, for every block of units.

    ``mean`` is under q, or under the data with the center p, and 0 for a block whose units are all
    dead.
    """

    weight: Tensor  # (blocks, 1): what divides the sums, 1 for a dead block
    offset: Tensor  # (blocks, inputs): the mean less the reference
    mean: Tensor  # (blocks, inputs)
    inert: Tensor | None  # (units,) bool, those whose bias has no influence


class Inverse(NamedTuple):
    """What ``W⁻¹`` is applied with: diagonals, or Cholesky factors, of every block of units.

    A block that is not usable has the identity in place of its factor, and its solutions are to be
    discarded.
    """

    factors: Tensor  # the diagonals (blocks, inputs), or the upper factors of `triangle.factorize`
    usable: Tensor  # (blocks,) bool

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``W⁻¹ rhs`` and which units have a W.

        Args:
            rhs: (units, inputs), the units of a block behind each other.

        Returns:
            The solutions, (units, inputs) and in the dtype of ``rhs`` whatever the factors are kept
            in, and (units,) bool.
        """
        by_block = rhs.unflatten(0, (len(self.usable), -1))
        if self.factors.dim() == 2:
            solved = by_block / self.factors[:, None]
        else:
            step = units_at_a_time(rhs.shape[1], self.factors.element_size(), CACHED)
            pieces = zip(self.factors.split(step), by_block.split(step), strict=True)
            solved = torch.cat([triangle.solve(U, b.to(U.dtype)) for U, b in pieces])
            solved = solved.to(rhs.dtype)
        return solved.flatten(0, 1), self.usable[:, None].expand(by_block.shape[:2]).flatten()


class Curvature:
    """The running sums of one layer, and what they make of its gradient.

    Units that share a matrix are a block. Every unit is one by itself, except under the center p,
    where all units of a group share theirs. The work is in the dtype of the sums.
    """

    def __init__(self, name: str, sums: RunningSums, rule: UpdateRule, dtype: torch.dtype) -> None:
        self.name, self.sums, self.rule, self.dtype = name, sums, rule, dtype
        self._known: Moments | None = None
        # W⁻¹, formed once for every damping and presence of a bias
        self._inverse: tuple[tuple[float, bool], Inverse | ExampleSolver] | None = None

    def changed(self) -> None:
        """Has what was formed of the sums be formed anew: these have changed.

        Sums decay together with the counts that divide them. The quotients are therefore
        bias-corrected running averages.
        """
        self._known = self._inverse = None

    def is_center_alone(self, g: Tensor, g0: Tensor) -> bool:
        """Returns whether `together.center_all` makes the same update."""
        sums = self.sums
        return (
            self.rule.scale == "none"
            and self.rule.center != "none"
            and len(sums.reference) == 1
            and "rounding" not in sums.parts
            and g.dtype == g0.dtype == sums.reference.dtype
        )

    def update(
        self, g: Tensor, g0: Tensor | None, damping: float, unit_damping: float
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the update of the layer's weights and biases, in the dtype of the sums.

        ``Δw = c⁻¹ W⁻¹ (g − g₀ r)`` and ``Δw₀ = g₀/c − rᵀΔw``; without a scale c and W are left
        out. Units without a usable W or c keep their center and lose the scale. Where the bias has
        no influence, c is rounding, and no mean is defined: ``Δw = A⁻¹g`` with ``A = E(δ² a aᵀ)``
        in place of ``c W``, damped alike, and ``Δw₀ = 0``. The center p knows no A, and leaves g.

        The relative error is that of products in the dtype of the sums, times ``inputs / damping``
        at most where W is a matrix.

        Args:
            g: (units, inputs), the gradient of the weights.
            g0: (units,), that of the biases; None for a layer without trainable biases.
            damping: λ in ``W + λ mean(diag W) I``.
            unit_damping: Adds so much of the layer's mean c to the c of every unit that has one.

        Raises:
            ValueError: If a W has no inverse and ``damping`` is 0.
        """
        dtype = self.sums.reference.dtype
        g, g0 = g.to(dtype), None if g0 is None else g0.to(dtype)
        moments = self._moments()
        inert, r = moments.inert, None
        if self.rule.center != "none":
            r = per_unit(moments.mean, len(g))
            r = r if inert is None else r.where(~inert[:, None], 0)
        dw = g if g0 is None or r is None else torch.addcmul(g, g0[:, None], r, value=-1)
        dw0 = g0
        if self.rule.scale != "none":
            dw, dw0 = self._scaled(dw, g0, moments, damping, unit_damping)
        if dw0 is None:
            return dw, None
        if r is not None:  # r is one row for all units, or one for each
            dw0 = torch.addmv(dw0, dw, r[0], alpha=-1) if len(r) == 1 else dw0 - dot(r, dw)
        return dw, dw0 if inert is None else dw0.where(~inert, 0)

    def _scaled(
        self,
        dw: Tensor,
        g0: Tensor | None,
        moments: Moments,
        damping: float,
        unit_damping: float,
    ) -> tuple[Tensor, Tensor | None]:
        """``c⁻¹ W⁻¹ dw`` and ``g₀/c``, and what they were where W or c is not usable."""
        inert, c = moments.inert, self.sums.parts["weight"][0] / self.sums.counted
        inverse = self._inverse_for(moments, damping, bias=g0 is not None)
        solved, solvable = inverse.solve(dw)
        usable = solvable & (c > 0)
        if unit_damping:
            c = c + unit_damping * c.mean()
        if inert is None:
            pass
        elif self.rule.center == "p":
            usable = usable & ~inert
        else:  # W is A itself
            usable, c = usable | (inert & solvable), c.where(~inert, 1)
        dw = torch.where(usable[:, None], solved / c[:, None], dw)
        return dw, None if g0 is None else torch.where(usable, g0 / c, g0)

    def _moments(self) -> Moments:
        """The mean of dead units is 0."""
        if self._known is None:
            self._known = self._form_moments()
        return self._known

    def _form_moments(self) -> Moments:
        parts, reference = self.sums.parts, self.sums.reference
        if self.rule.center == "p":
            offset = parts["total"][0] / self.sums.positions
            weight = reference.new_full((len(reference), 1), self.sums.positions)
            return Moments(weight, offset, reference + offset, self.sums.bias_inert)
        weight, first = parts["weight"][0][:, None], parts["first"][0]
        inert = self.sums.bias_inert
        alive = weight > 0
        if inert is not None:
            weight = weight.where(~inert[:, None], self.sums.counted)
            # errors that cancel have second moments that are the same about every point, 0 too
            first = first.where(~inert[:, None], 0)
            alive = alive & ~inert[:, None]
        weight = weight.where(weight > 0, 1.0)
        offset = first / weight
        if len(reference) == 1:
            mean = torch.addcmul(offset, alive.to(offset.dtype), reference)
        else:
            mean = (per_unit(reference, len(offset)) + offset).mul_(alive)
        return Moments(weight, offset, mean, inert)

    def _inverse_for(
        self, moments: Moments, damping: float, bias: bool
    ) -> "Inverse | ExampleSolver":
        if self._inverse is None or self._inverse[0] != (damping, bias):
            if "samples" in self.sums.parts:
                inverse = ExampleSolver(self.name, self.sums, damping, bias)
            elif self.rule.scale == "diagonal":
                inverse = self._diagonal(moments, damping, bias)
            else:
                inverse = self._full(moments, damping, bias)
            self._inverse = (damping, bias), inverse
        return self._inverse[1]

    # -- W: second moments about the center --------------------------------------------------------

    def _diagonal(self, moments: Moments, damping: float, bias: bool) -> Inverse:
        weight, offset, mean = moments[:3]
        W = torch.addcmul(self.sums.parts["second"][0] / weight, offset, offset, value=-1)
        W.clamp_(min=0)
        if self.rule.center == "none":
            W.addcmul_(mean, mean)
        variance, measured = W.sum(1, keepdim=True), W
        usable = has_variance(W, offset, self.dtype)
        W = W + variance * (damping / W.shape[1])
        if not bias and self.rule.center != "none":
            W.addcmul_(mean, mean)
        if damping == 0:
            flat = measured <= rounding(self.dtype) * (measured + offset.square())
            r = mean if self.rule.center != "none" else torch.zeros_like(mean)
            singular = (flat & (W <= rounding(self.dtype) * r.square())).any(1)
            self._refuse_singular(singular & usable)
        return Inverse(W, usable)

    def _full(self, moments: Moments, damping: float, bias: bool) -> Inverse:
        """Cholesky factors, of matrices that are formed and factored in pieces."""
        weight, offset, mean = moments[:3]
        blocks, inputs = offset.shape
        dtype = self._factor_dtype(inputs, damping, bias)
        factors = offset.new_empty(blocks, inputs, inputs, dtype=dtype)
        usable = torch.empty(blocks, dtype=torch.bool, device=offset.device)
        second = self.sums.parts["second"]
        step = units_at_a_time(inputs, factors.element_size(), CACHED)
        identity = torch.eye(inputs, dtype=dtype, device=offset.device)
        for piece in (slice(i, i + step) for i in range(0, blocks, step)):
            W = factors[piece]
            if self.rule.center == "p":
                W.copy_(second[0][piece])
            else:
                triangle.dense(second, piece, W)
            W.div_(weight[piece, :, None])
            o, m = offset[piece].to(dtype), mean[piece].to(dtype)
            _add_outer(W, o, -1.0)
            if self.rule.center == "none":
                _add_outer(W, m)
            diagonal = W.diagonal(dim1=1, dim2=2)
            alive = has_variance(diagonal.clamp(min=0), o, self.dtype)
            diagonal += damping * diagonal.mean(1, keepdim=True)
            if not bias and self.rule.center != "none":
                _add_outer(W, m)
            failed = triangle.factorize(W, damping, self.dtype)
            if damping == 0:
                self._refuse_singular(failed & alive)
            usable[piece] = alive & ~failed
            # in the cache still, and the host need not know whether there are any
            W.copy_(torch.where(usable[piece, None, None], W, identity))
        return Inverse(factors, usable)

    def _factor_dtype(self, inputs: int, damping: float, bias: bool) -> torch.dtype:
        """Damped by λ times their mean diagonal, matrices have condition numbers up to ``inputs/λ +
        1``; without a bias r rᵀ is added.
        """
        if self.sums.reference.dtype != torch.float32 or damping == 0 or not bias:
            return torch.float64
        error = (inputs / damping + 1) * torch.finfo(torch.float32).eps
        return torch.float64 if error > FLOAT32_ERROR else torch.float32

    def _refuse_singular(self, singular: Tensor) -> None:
        if singular.any():
            raise no_inverse(self.name, int(singular.sum()), len(singular))


def _add_outer(W: Tensor, x: Tensor, factor: float = 1.0) -> None:
    W.baddbmm_(x[:, :, None], x[:, None, :], alpha=factor)


def per_unit(x: Tensor, units: int) -> Tensor:
    """Returns the rows of groups, repeated for the units of each; a single row stays one."""
    return x if len(x) in (1, units) else x.repeat_interleave(units // len(x), 0)
