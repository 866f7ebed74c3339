"""One matrix that makes the covariances of all units of a layer nearly the identity: that of the activations under their mean q."""

import torch
from torch import Tensor

from biasshift.fisher.convolution import Maps
from biasshift.fisher.samples import ImplicitSums

RIDGE = 0.15  # times inputs / effective samples: so much less varies the q of one unit than the mean of all, and in fewer directions
RIDGE_OF_MAPS = 3.0  # their positions depend on each other
LARGEST = 2**28  # bytes of one matrix in float64: 5792 channels


class Preconditioner:
    """``D⁻¹ (C + λ mean(diag C) I)⁻¹ D⁻¹``: C for all units, D from the variances of one.

    C is over channels, and the same at all places of a kernel. Where it would be too large, D does alone.
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
            z = z @ self.inverse if channels == z.shape[1] else self._over_channels(z.unflatten(1, (channels, -1))).flatten(1)
        return z.mul_(scale)

    def _over_channels(self, z: Tensor) -> Tensor:
        assert self.inverse is not None
        return (z.transpose(1, 2) @ self.inverse).transpose(1, 2)
