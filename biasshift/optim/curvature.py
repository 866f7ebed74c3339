"""The running sums of one layer, and what they make of its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.cholesky import Singular, rounding
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.solver import Solver
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule
from biasshift.theory import dot

FACTOR_BYTES = 2**28  # of the matrices that are formed at a time, before they are factored
# of a step of a float32 model, that factors may bring in which are kept in float32: they are read
# twice as fast
HALVED_ERROR = 1e-3
TOLERANCE, SINGLE_TOLERANCE = 1e-8, 1e-5  # relative residuals
ITERATIONS = 200


class Moments(NamedTuple):
    """First moments of every block of units: what divides its sums, (blocks, 1); the mean less the
    reference, the mean, the center.
    """

    weight: Tensor
    offset: Tensor
    mean: Tensor
    center: Tensor


class Curvature:
    """The running sums of one layer, and what they make of its gradient.

    Units that share a matrix are a block: every unit is one, except under the center p, where a
    group of units is.
    """

    def __init__(self, name: str, sums: RunningSums, rule: UpdateRule, dtype: torch.dtype) -> None:
        self.name, self.sums, self.rule, self.dtype = name, sums, rule, dtype
        self._examples: tuple[tuple[float, bool], Examples] | None = None
        self._kept: tuple[tuple[float, bool], Tensor, Tensor] | None = None

    def add(self, new: RunningSums, decay: float) -> None:
        """RunningSums decay together with the counts that divide them: their quotients are bias-corrected
        running averages.
        """
        self.sums.add(new, decay)
        self._kept = self._examples = None

    def update(
        self, g: Tensor, g0: Tensor | None, damping: float, unit_damping: float
    ) -> tuple[Tensor, Tensor | None]:
        """``Δw = c⁻¹ W⁻¹ (g − g₀ r)`` and ``Δw₀ = g₀/c − rᵀΔw``, float64; without c and W where
        there is no scale.

        ``c`` is ``E_p(δ̄²)`` plus ``unit_damping`` times its mean over the layer's units.
        """
        moments = self._moments()
        r = _repeated(moments.center, len(g))
        dw = g if g0 is None else torch.addcmul(g, g0[:, None], r, value=-1)
        moved = g0
        if self.rule.scale != "none":
            c = self.sums.parts["weight"][0] / self.sums.examples
            solved, usable = self._solve(dw, moments, damping, bias=g0 is not None)
            usable = usable & (c > 0)
            c = c + unit_damping * c.mean()
            dw = torch.where(usable[:, None], solved / c[:, None], dw)
            moved = g0 if g0 is None else torch.where(usable, g0 / c, g0)
        return dw, moved if moved is None else moved - dot(r, dw)

    def _moments(self) -> Moments:
        """The mean of dead units is 0."""
        parts, reference = self.sums.parts, self.sums.reference
        if self.rule.center == "p":
            weight, first = (
                reference.new_full((len(reference), 1), self.sums.positions),
                parts["total"][0],
            )
        else:
            weight, first = parts["weight"][0][:, None], parts["first"][0]
        alive = weight > 0
        weight = torch.where(alive, weight, 1.0)
        offset = first / weight
        mean = (_repeated(reference, len(offset)) + offset).mul_(alive)
        return Moments(
            weight, offset, mean, torch.zeros_like(mean) if self.rule.center == "none" else mean
        )

    # -- the curvature: second moments about the center --------------------------------------------

    def _solve(
        self, rhs: Tensor, moments: Moments, damping: float, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """``W⁻¹ rhs``, (units, inputs), and which units have a W."""
        if "samples" in self.sums.parts:
            if self._examples is None or self._examples[0] != (damping, bias):
                self._examples = (damping, bias), Examples(self.name, self.sums, damping, bias)
            return self._examples[1].solve(rhs)
        if self._kept is None or self._kept[0] != (damping, bias):
            form = self._diagonal if self.rule.scale == "diagonal" else self._factors
            factors, usable = form(moments, damping, bias)
            self._kept = (damping, bias), factors, usable
        _, factors, usable = self._kept
        by_block = rhs.unflatten(0, (len(usable), -1))
        if factors.dim() == 2:
            solved = by_block / factors[:, None]
        else:  # cholesky_solve would copy the factors, which takes 20 times as long
            half = torch.linalg.solve_triangular(
                factors, by_block.mT.to(factors.dtype), upper=False
            )
            solved = torch.linalg.solve_triangular(factors.mT, half, upper=True).mT.double()
        return solved.flatten(0, 1), usable[:, None].expand(by_block.shape[:2]).flatten()

    def _diagonal(self, moments: Moments, damping: float, bias: bool) -> tuple[Tensor, Tensor]:
        """The diagonal of every block's W, and which are usable."""
        weight, offset, mean, r = moments
        W = (self.sums.parts["second"][0] / weight - offset.square()).clamp_(min=0)
        if self.rule.center == "none":
            W += mean.square()
        usable, measured = self._usable(W, offset), W
        W = W + damping * W.mean(1, keepdim=True)
        if not bias:
            W += r.square()
        if damping == 0:
            flat = measured <= rounding(self.dtype) * (measured + offset.square())
            self._refuse_singular((flat & (W <= rounding(self.dtype) * r.square())).any(1) & usable)
        return W, usable

    def _factors(self, moments: Moments, damping: float, bias: bool) -> tuple[Tensor, Tensor]:
        """Cholesky factors of every block's W, formed in pieces, and which are usable."""
        weight, offset, mean, r = moments
        blocks, inputs = offset.shape
        factors = offset.new_empty(
            blocks, inputs, inputs, dtype=self._kept_dtype(inputs, damping, bias)
        )
        usable = torch.empty(blocks, dtype=torch.bool, device=offset.device)
        one = torch.eye(inputs, dtype=offset.dtype, device=offset.device)
        step = max(1, FACTOR_BYTES // (8 * inputs**2))
        for some in (slice(i, i + step) for i in range(0, blocks, step)):
            W = self._second(some) / weight[some, :, None]
            _add_outer(W, offset[some], -1.0)
            _add_outer(W, mean[some] - r[some])
            diagonal = W.diagonal(dim1=1, dim2=2)
            alive = self._usable(diagonal, offset[some])
            diagonal += damping * diagonal.mean(1, keepdim=True)
            if not bias:
                _add_outer(W, r[some])
            factor, info = torch.linalg.cholesky_ex(W)
            failed = info > 0
            if damping == 0:  # a pivot is what the inputs before leave unexplained of this one
                pivots = factor.diagonal(dim1=1, dim2=2).square()
                failed |= (pivots <= inputs * torch.finfo(self.dtype).eps * diagonal).any(1)
                self._refuse_singular(failed & alive)
            usable[some] = alive & ~failed
            factors[some] = torch.where(usable[some, None, None], factor, one)
        return factors, usable

    def _kept_dtype(self, inputs: int, damping: float, bias: bool) -> torch.dtype:
        """Damped by λ times their mean diagonal, matrices have condition numbers up to ``inputs/λ +
        1``; without a bias r rᵀ is added.
        """
        exact = self.dtype != torch.float32 or damping == 0 or not bias
        exact = exact or (inputs / damping + 1) * torch.finfo(torch.float32).eps > HALVED_ERROR
        return torch.float64 if exact else torch.float32

    def _second(self, some: slice) -> Tensor:
        second = self.sums.parts["second"]
        return second[0][some] if self.rule.center == "p" else packed.dense(second, some)

    def _usable(self, diagonal: Tensor, offset: Tensor) -> Tensor:
        """Blocks with more variance than rounding: relative damping helps no others."""
        variance = diagonal.clamp(min=0).sum(1)
        return variance > rounding(self.dtype) * (variance + offset.square().sum(1))

    def _refuse_singular(self, units: Tensor) -> None:
        if units.any():
            raise ValueError(
                f"Layer '{self.name}': the curvature has no inverse for {int(units.sum())} of "
                f"{len(units)} units at damping=0, where "
                "inputs never vary, or examples are fewer than inputs. Use damping > 0, for "
                "example 1e-3."
            )


def _add_outer(W: Tensor, x: Tensor, factor: float = 1.0) -> None:
    W.baddbmm_(x[:, :, None], x[:, None, :], alpha=factor)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """One row per group of units, repeated for its units."""
    return x.expand(rows, -1) if len(x) == 1 else x.repeat_interleave(rows // len(x), 0)


# -- layers too large for matrices -------------------------------------------------------------


class Examples:
    """Solves with ``V = Var_q(a)`` of the examples of one look, without forming it."""

    def __init__(self, name: str, sums: RunningSums, damping: float, bias: bool) -> None:
        shifted, delta2 = sums.parts["samples"]
        fisher = UnitFisher.from_samples(shifted, delta2, storage="implicit")
        assert isinstance(fisher.sums, ImplicitSums)
        self.name, self.bias = name, bias
        self.mean = fisher.sums.mean_q + sums.reference
        self.tolerance = TOLERANCE if shifted.dtype == torch.float64 else SINGLE_TOLERANCE
        self.solver = Solver(fisher.sums, damping, shifted.dtype)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """``V⁻¹ rhs``, and which units have a V that one can solve with; without a bias ``(V + m
        mᵀ)⁻¹ rhs``, both damped.

        Where one example has nearly all of a unit's δ², what V there is drowns in rounding: no
        iteration gets anywhere.
        """
        found = self._centered(rhs)
        if not self.bias:  # Sherman–Morrison
            m = self.mean.nan_to_num(nan=0.0)
            whitened = self._centered(m)
            found = found - whitened * (dot(m, found) / (1 + dot(m, whitened)))[:, None]
        usable = found.isfinite().all(1)
        return torch.where(usable[:, None], found, 0.0), usable

    def _centered(self, rhs: Tensor) -> Tensor:
        try:
            return self.solver.solve(rhs, self.tolerance, ITERATIONS)
        except Singular:
            raise ValueError(
                f"Layer '{self.name}': the curvature has no inverse at damping=0, where inputs "
                "never vary, or examples are fewer than "
                "inputs. Use damping > 0, for example 1e-3."
            ) from None
