"""``(V + λ mean(diag V) I)⁻¹`` applied to vectors for all units of a layer, from products with ``V`` alone.

Conjugate gradients batched over units: one product serves them all, and converged units leave the batch. Where samples are fewer
than inputs, Woodbury's formula with one Gram matrix of the samples takes their place. Either way the residual is then computed
in float64, and what it leaves is solved for again: single precision loses no digits of the answer.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from biasshift.implicit import ImplicitSums, Samples
from biasshift.precision import full_precision
from biasshift.preconditioning import Preconditioner
from biasshift.solving import Singular, rounding, variances, without_variance
from biasshift.theory import dot

TYPICAL = 40  # iterations, to compare costs with
WORK = 2**28  # bytes that the vectors of all units solved together may take
CYCLES = 8  # solves in a row, each for the residual of the last


class Solver:
    """The solver of one layer at one damping. Residuals are relative: ``|W x − b| ≤ tolerance |b|`` for every unit."""

    def __init__(self, sums: ImplicitSums, damping: float, dtype: torch.dtype):
        self.sums, self.damping, self.dtype = sums, damping, torch.promote_types(dtype, torch.float32)
        self.usable = (sums.weight > 0) & ~without_variance(sums, dtype)
        self._variances = variances(sums)
        self._method: Woodbury | ConjugateGradients | None = None

    def solve(self, rhs: Tensor, tolerance: float, max_iterations: int) -> Tensor:
        """``W⁻¹ rhs`` for (units, inputs), float64; NaN for units that are not usable or have not converged.

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
        if any(part.bytes == 0 for part in self.sums.parts):  # read again for every product: all units at once
            return len(self.sums.weight)
        itemsize = torch.finfo(self.dtype).bits // 8
        return max(1, WORK // (self.sums.first.shape[1] * (6 * itemsize + 24)))

    def _refuse_singular(self) -> None:
        if self.damping > 0 or not self.usable.any():
            return
        constant = self._variances <= rounding(self.dtype) * self.sums.squares_q
        few = self.usable & (constant.any(1) | (self.sums.positions < constant.shape[1]))
        if few.any():
            raise Singular(int(few.sum()), constant[self.usable].all(0).nonzero().flatten().tolist())

    def _refined(self, units: Tensor, b: Tensor, tolerance: float, iterations: int) -> Tensor:
        """Units that a solve brought nowhere near are given up."""
        sums = self.sums if len(units) == len(self.sums.weight) else self.sums.select(units)
        ridge, goal = self.damping * self._variances[units].mean(1), tolerance * b.norm(dim=1)
        x, left, r = torch.zeros_like(b), b.norm(dim=1), b
        waiting = (left > 0).nonzero().flatten()
        for _ in range(CYCLES):
            if not len(waiting) or iterations <= 0:
                break
            some = sums if len(waiting) == len(b) else sums.select(waiting)
            r = r if len(r) == len(waiting) else b[waiting]
            step, used = self._solve(some, r, goal[waiting], ridge[waiting], units[waiting], iterations)
            iterations -= used
            x[waiting] += step
            r = b[waiting] - some.times(x[waiting]) - ridge[waiting, None] * x[waiting]
            before, now = left[waiting], r.norm(dim=1)
            left[waiting] = now
            goal[waiting] = goal[waiting].maximum(self._rounding(units[waiting], x[waiting]))
            more = (now > goal[waiting]) & (now < 0.5 * before)
            waiting, r = waiting[more], r[more]
        return x.where((left <= goal)[:, None], torch.nan)

    def _rounding(self, units: Tensor, x: Tensor) -> Tensor:
        """The residual of the exact solution in float64: a bound on ``|W|`` times ``|x|`` times the last digit."""
        trace = (1 + self.damping) * self._variances[units].sum(1)
        return 4 * torch.finfo(torch.float64).eps * trace * x.norm(dim=1)

    def _solve(self, sums: ImplicitSums, r: Tensor, goal: Tensor, ridge: Tensor, units: Tensor, most: int) -> tuple[Tensor, int]:
        if self._method is None:
            self._method = self._chosen()
        return self._method.solve(sums, r, goal, ridge, self._variances[units], most)

    def _chosen(self) -> "Woodbury | ConjugateGradients":
        """By the cost of a unit: a Cholesky factor in float64 over the samples, or some iterations."""
        samples, inputs = self.sums.positions, self.sums.first.shape[1]
        if samples < inputs and all(isinstance(part, Samples) for part in self.sums.parts):
            if 2 * samples**3 / 3 < TYPICAL * (4 * samples * inputs + 2 * inputs**2):
                return Woodbury(self.sums)
        return ConjugateGradients(Preconditioner(self.sums, self.usable, self.damping, self.dtype), self.dtype)


# -- conjugate gradients ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What every unit of the batch carries from one iteration to the next."""

    units: Tensor  # their places in the answer
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor  # rᵀM⁻¹r, float64
    goal: Tensor  # of |r|
    ridge: Tensor
    scale: Tensor  # of the preconditioner
    done: Tensor

    def keep(self, mask: Tensor) -> "State":
        return replace(self, **{field.name: getattr(self, field.name)[mask] for field in fields(self)})


class ConjugateGradients:
    """Products in the working precision, inner products in float64."""

    def __init__(self, preconditioner: Preconditioner, dtype: torch.dtype):
        self.preconditioner, self.dtype = preconditioner, dtype

    def solve(self, sums: ImplicitSums, r: Tensor, goal: Tensor, ridge: Tensor, variances: Tensor, most: int) -> tuple[Tensor, int]:
        """An x with ``|W x − r| ≤ goal``, by the recurrence of the residual, and the number of iterations."""
        size = r.norm(dim=1)
        floor = 10 * torch.finfo(self.dtype).eps  # below, the recurrence has lost the residual
        state = self._start(r / size[:, None], (goal / size).clamp(min=floor), ridge, self.preconditioner.scale(variances))
        x = torch.zeros_like(state.x)
        product = Product(sums, self.dtype)
        for iteration in range(1, most + 1):
            state = self._descended(state, product(state.p, state.ridge))
            leaving = int(state.done.sum())
            if leaving == len(state.done) or iteration == most:
                break
            if 8 * leaving >= len(state.done):  # not one by one: leaving means copying
                x[state.units[state.done]] = state.x[state.done]
                stay = ~state.done
                state, product = state.keep(stay), product.keep(stay)
            state = self._turned(state)
        x[state.units] = state.x
        return x.double() * size[:, None], iteration

    def _start(self, r: Tensor, goal: Tensor, ridge: Tensor, scale: Tensor) -> State:
        r = r.to(self.dtype)
        z = self.preconditioner(r, scale)
        n = torch.arange(len(r), device=r.device)
        return State(n, torch.zeros_like(r), r, z, inner(r, z), goal, ridge, scale, torch.zeros_like(n, dtype=torch.bool))

    def _descended(self, s: State, Wp: Tensor) -> State:
        """To the minimum along p. What is done stays where it is; so does what has met rounding in place of curvature."""
        curvature = inner(s.p, Wp)
        going = ~s.done & (curvature > 0)
        alpha = torch.where(going, s.rz / curvature, 0.0).to(self.dtype)[:, None]
        x, r = torch.addcmul(s.x, alpha, s.p), torch.addcmul(s.r, alpha, Wp, value=-1)
        return replace(s, x=x, r=r, done=~going | (inner(r, r).sqrt() <= s.goal))

    def _turned(self, s: State) -> State:
        """To the next direction."""
        z = self.preconditioner(s.r, s.scale)
        rz = inner(s.r, z)
        return replace(s, p=torch.addcmul(z, (rz / s.rz).to(self.dtype)[:, None], s.p), rz=rz)


class Product:
    """``W p`` in the working precision, for the units that are left."""

    def __init__(self, sums: ImplicitSums, dtype: torch.dtype):
        self.sums, self.offset, self.share = sums, sums.offset_q.to(dtype), (1 / sums.weight).to(dtype)[:, None]

    def __call__(self, p: Tensor, ridge: Tensor) -> Tensor:
        out = self.sums.product(p).mul_(self.share)
        out.addcmul_(self.offset, inner(self.offset, p).to(p.dtype)[:, None], value=-1)
        return out.addcmul_(p, ridge.to(p.dtype)[:, None])

    def keep(self, mask: Tensor) -> "Product":
        return Product(self.sums.select(mask.nonzero().flatten()), self.offset.dtype)


def inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, dtype=torch.float64)


# -- fewer samples than inputs ---------------------------------------------------------------------------------------------


class Woodbury:
    """``(YᵀY + τ I)⁻¹ b = (b − Yᵀ (YYᵀ + τ I)⁻¹ Y b)/τ``, where the rows of Y are samples times the root of their weight under q.

    The Gram matrix of the samples is that of all units: ``YYᵀ`` is read off it. Everything in float64.
    """

    def __init__(self, sums: ImplicitSums):
        self.a = torch.cat([part.a for part in sums.parts if isinstance(part, Samples)]).double()
        self.gram = self.a @ self.a.T

    def solve(self, sums: ImplicitSums, r: Tensor, goal: Tensor, ridge: Tensor, variances: Tensor, most: int) -> tuple[Tensor, int]:
        x = torch.empty_like(r)
        delta2 = torch.cat([part.delta2 for part in sums.parts if isinstance(part, Samples)], 1)
        for units in torch.arange(len(r), device=r.device).split(max(1, WORK // (24 * len(self.a) ** 2))):
            q = delta2[units].double() / sums.weight[units, None]
            x[units] = self._solve(q, r[units], ridge[units])
        return x, 1

    def _solve(self, q: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
        root, mean, h = q.sqrt(), q @ self.a, q @ self.gram
        K = self.gram - h[:, :, None] - h[:, None, :] + dot(q, h)[:, None, None]
        K.mul_(root[:, :, None]).mul_(root[:, None, :])
        K.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        Yb = root * (b @ self.a.T - dot(mean, b)[:, None])
        z = root * torch.cholesky_solve(Yb[:, :, None], torch.linalg.cholesky_ex(K)[0])[:, :, 0]
        return (b - z @ self.a + z.sum(1, keepdim=True) * mean) / ridge[:, None]
