"""Preconditioned conjugate gradients for all units of a layer at once.

One product serves all units, and converged units leave the batch. One preconditioner serves them
too: the covariance of the activations under the mean of all q, which makes that of every unit
nearly the identity.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from biasshift.fisher.parts import SampledSums

# times inputs / effective samples: the q of one unit varies by so much less than the mean of all,
# and in fewer directions
RIDGE = 0.15
RIDGE_OF_MAPS = 3.0  # their positions depend on each other
LARGEST = 2**28  # bytes of one matrix in float64: 5792 channels


class Preconditioner:
    """``D⁻¹ (C + ρ mean(diag C) I)⁻¹ D⁻¹``: C for all units, D from the variances of one.

    C is over channels, and the same at all places of a kernel. Where it would be too large, D does
    alone. The ridge ρ is the damping, or more where few effective samples determine V.

    Args:
        sums: the sums of the layer, whose parts C is formed of once.
        usable: (units,) bool, the units that C is the mean of.
        damping: λ of the equations to be solved.
        dtype: that of the vectors it is applied to.
    """

    def __init__(self, sums: SampledSums, usable: Tensor, damping: float, dtype: torch.dtype):
        typical = sums.effective_samples[usable].median().item()
        self.ridge, self.dtype = max(damping, RIDGE * sums.first.shape[1] / typical), dtype
        if any(part.terms in ("examples", "positions") for part in sums.parts):
            self.ridge = max(self.ridge, RIDGE_OF_MAPS)
        self.inverse: Tensor | None = None
        if 8 * sums.parts[0].channels ** 2 > LARGEST:
            return
        C = sums.spread(usable / usable.sum())
        C.diagonal().add_(self.ridge * C.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(C)
        if int(info) == 0:
            self.diagonal = C.diagonal().repeat_interleave(sums.first.shape[1] // len(C))
            del C
            self.inverse = torch.cholesky_inverse(factor).to(dtype)

    def scale(self, variances: Tensor) -> Tensor:
        """Returns ``D⁻¹`` of some units, (units, inputs), from their diag V."""
        own = variances + self.ridge * variances.mean(1, keepdim=True)
        return (own if self.inverse is None else own / self.diagonal).rsqrt().to(self.dtype)

    def __call__(self, r: Tensor, scale: Tensor) -> Tensor:
        """The preconditioned residuals, (units, inputs), of units with these scales."""
        z = r * scale
        if self.inverse is None:
            return z.mul_(scale)
        channels = len(self.inverse)
        if channels == z.shape[1]:
            return (z @ self.inverse).mul_(scale)
        return (z.unflatten(1, (channels, -1)).mT @ self.inverse).mT.flatten(1).mul_(scale)


@dataclass(frozen=True)
class _State:
    """What every unit of the batch carries from one iteration to the next."""

    units: Tensor  # their places in the answer
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor  # rᵀM⁻¹r, float64
    goal: Tensor  # of |r|
    ridge: Tensor
    scale: Tensor  # of the preconditioner
    offset: Tensor  # m − reference
    share: Tensor  # 1 / Σ δ², (units, 1)
    done: Tensor

    def keep(self, mask: Tensor) -> "_State":
        return replace(
            self, **{field.name: getattr(self, field.name)[mask] for field in fields(self)}
        )


class ConjugateGradients:
    """The iteration for some units of a layer, in the working precision of the vectors.

    Inner products are float64. The residual is that of the recurrence, which drifts from the true
    one by rounding: `solver.Solver` computes that in float64, and solves for it again.
    """

    def __init__(self, preconditioner: Preconditioner, dtype: torch.dtype):
        self.preconditioner, self.dtype = preconditioner, dtype

    def solve(
        self,
        sums: SampledSums,
        r: Tensor,
        goal: Tensor,
        ridge: Tensor,
        variances: Tensor,
        most: int,
    ) -> tuple[Tensor, int]:
        """Returns an x with ``|W x − r| ≤ goal`` where it has converged, and the iterations used.

        Args:
            sums: those of the units to solve for.
            r: the right sides, (units, inputs), float64 and not 0.
            goal: (units,), the norm of the residual to reach.
            ridge: (units,), what damping adds to the diagonal: ``W = V + ridge I``.
            variances: diag V, (units, inputs).
            most: how many iterations there may be.
        """
        size = r.norm(dim=1)
        floor = 10 * torch.finfo(self.dtype).eps  # below, the recurrence has lost the residual
        scale = self.preconditioner.scale(variances)
        goal = (goal / size).clamp(min=floor)
        state = self._start(sums, r / size[:, None], goal, ridge, scale)
        x = torch.zeros_like(state.x)
        for iteration in range(1, most + 1):
            state = self._descend(state, _product(sums, state))
            leaving = int(state.done.sum())
            if leaving == len(state.done) or iteration == most:
                break
            if 8 * leaving >= len(state.done):  # not one by one: leaving means copying
                x[state.units[state.done]] = state.x[state.done]
                stay = ~state.done
                state, sums = state.keep(stay), sums.select(stay.nonzero().flatten())
            state = self._turn(state)
        x[state.units] = state.x
        return x.double() * size[:, None], iteration

    def _start(
        self, sums: SampledSums, r: Tensor, goal: Tensor, ridge: Tensor, scale: Tensor
    ) -> _State:
        r = r.to(self.dtype)
        z = self.preconditioner(r, scale)
        return _State(
            units=torch.arange(len(r), device=r.device),
            x=torch.zeros_like(r),
            r=r,
            p=z,
            rz=_inner(r, z),
            goal=goal,
            ridge=ridge,
            scale=scale,
            offset=sums.offset_q.to(self.dtype),
            share=(1 / sums.weight).to(self.dtype)[:, None],
            done=torch.zeros(len(r), dtype=torch.bool, device=r.device),
        )

    def _descend(self, s: _State, Wp: Tensor) -> _State:
        """To the minimum along p. What is done stays where it is; so does what has met rounding in
        place of curvature.
        """
        curvature = _inner(s.p, Wp)
        going = ~s.done & (curvature > 0)
        alpha = torch.where(going, s.rz / curvature, 0.0).to(self.dtype)[:, None]
        x, r = torch.addcmul(s.x, alpha, s.p), torch.addcmul(s.r, alpha, Wp, value=-1)
        return replace(s, x=x, r=r, done=~going | (_inner(r, r).sqrt() <= s.goal))

    def _turn(self, s: _State) -> _State:
        """To the next direction."""
        z = self.preconditioner(s.r, s.scale)
        rz = _inner(s.r, z)
        return replace(s, p=torch.addcmul(z, (rz / s.rz).to(self.dtype)[:, None], s.p), rz=rz)


def _product(sums: SampledSums, s: _State) -> Tensor:
    """``W p`` in the working precision, for the units that are left."""
    Wp = sums.product(s.p).mul_(s.share)
    Wp.addcmul_(s.offset, _inner(s.offset, s.p).to(s.p.dtype)[:, None], value=-1)
    return Wp.addcmul_(s.p, s.ridge.to(s.p.dtype)[:, None])


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, dtype=torch.float64)
