"""Conjugate gradients for all units of a layer at once: one product serves them all, and converged
units leave the batch.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from biasshift.fisher.convolution import Maps
from biasshift.fisher.samples import ImplicitSums

# times inputs / effective samples: so much less varies the q of one unit than the mean of all, and
# in fewer directions
RIDGE = 0.15
RIDGE_OF_MAPS = 3.0  # their positions depend on each other
LARGEST = 2**28  # bytes of one matrix in float64: 5792 channels


# -- one matrix that makes the covariances of all units of a layer nearly the identity ---------


class Preconditioner:
    """``D⁻¹ (C + λ mean(diag C) I)⁻¹ D⁻¹``: C for all units, D from the variances of one.

    C is over channels, and the same at all places of a kernel. Where it would be too large, D does
    alone.
    """

    def __init__(self, sums: ImplicitSums, usable: Tensor, damping: float, dtype: torch.dtype):
        typical = sums.effective_samples[usable].median().item()
        self.ridge, self.dtype = max(damping, RIDGE * sums.first.shape[1] / typical), dtype
        if any(isinstance(part, Maps) for part in sums.parts):
            self.ridge = max(self.ridge, RIDGE_OF_MAPS)
        self.inverse: Tensor | None = None
        C = self._covariance(sums, usable)
        if C is None:
            return
        C.diagonal().add_(self.ridge * C.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(C)
        if int(info) == 0:
            self.diagonal = C.diagonal().repeat_interleave(sums.first.shape[1] // len(C))
            del C
            self.inverse = torch.cholesky_inverse(factor).to(dtype)

    def _covariance(self, sums: ImplicitSums, usable: Tensor) -> Tensor | None:
        channels = sums.parts[0].channels
        if 8 * channels**2 > LARGEST:
            return None
        return sums.spread(usable / usable.sum())

    def scale(self, variances: Tensor) -> Tensor:
        """D of some units, as its inverse."""
        own = variances + self.ridge * variances.mean(1, keepdim=True)
        return (own if self.inverse is None else own / self.diagonal).rsqrt().to(self.dtype)

    def __call__(self, r: Tensor, scale: Tensor) -> Tensor:
        z = r * scale
        if self.inverse is not None:
            channels = len(self.inverse)
            z = (
                z @ self.inverse
                if channels == z.shape[1]
                else self._over_channels(z.unflatten(1, (channels, -1))).flatten(1)
            )
        return z.mul_(scale)

    def _over_channels(self, z: Tensor) -> Tensor:
        assert self.inverse is not None
        return (z.transpose(1, 2) @ self.inverse).transpose(1, 2)


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
        return replace(
            self, **{field.name: getattr(self, field.name)[mask] for field in fields(self)}
        )


class ConjugateGradients:
    """Products in the working precision, inner products in float64."""

    def __init__(self, preconditioner: Preconditioner, dtype: torch.dtype):
        self.preconditioner, self.dtype = preconditioner, dtype

    def solve(
        self,
        sums: ImplicitSums,
        r: Tensor,
        goal: Tensor,
        ridge: Tensor,
        variances: Tensor,
        most: int,
    ) -> tuple[Tensor, int]:
        """An x with ``|W x − r| ≤ goal``, by the recurrence of the residual, and the number of
        iterations.
        """
        size = r.norm(dim=1)
        floor = 10 * torch.finfo(self.dtype).eps  # below, the recurrence has lost the residual
        state = self._start(
            r / size[:, None],
            (goal / size).clamp(min=floor),
            ridge,
            self.preconditioner.scale(variances),
        )
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
        return State(
            n,
            torch.zeros_like(r),
            r,
            z,
            inner(r, z),
            goal,
            ridge,
            scale,
            torch.zeros_like(n, dtype=torch.bool),
        )

    def _descended(self, s: State, Wp: Tensor) -> State:
        """To the minimum along p. What is done stays where it is; so does what has met rounding in
        place of curvature.
        """
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
        self.sums, self.offset, self.share = (
            sums,
            sums.offset_q.to(dtype),
            (1 / sums.weight).to(dtype)[:, None],
        )

    def __call__(self, p: Tensor, ridge: Tensor) -> Tensor:
        out = self.sums.product(p).mul_(self.share)
        out.addcmul_(self.offset, inner(self.offset, p).to(p.dtype)[:, None], value=-1)
        return out.addcmul_(p, ridge.to(p.dtype)[:, None])

    def keep(self, mask: Tensor) -> "Product":
        return Product(self.sums.select(mask.nonzero().flatten()), self.offset.dtype)


def inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, dtype=torch.float64)
