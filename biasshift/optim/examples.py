"""Layers too large for matrices: V of the latest examples, which are kept in its place."""

import torch
from torch import Tensor

from biasshift.fisher.cholesky import Singular
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.solver import Solver
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.optim.running_sums import Sums
from biasshift.theory import dot

TOLERANCE, SINGLE_TOLERANCE = 1e-8, 1e-5  # relative residuals
ITERATIONS = 200


class Examples:
    """Solves with ``V = Var_q(a)`` of the examples of one look, without forming it."""

    def __init__(self, name: str, sums: Sums, damping: float, bias: bool) -> None:
        shifted, delta2 = sums.parts["samples"]
        fisher = UnitFisher.from_samples(shifted, delta2, storage="implicit")
        assert isinstance(fisher.sums, ImplicitSums)
        self.name, self.bias = name, bias
        self.mean = fisher.sums.mean_q + sums.reference
        self.tolerance = TOLERANCE if shifted.dtype == torch.float64 else SINGLE_TOLERANCE
        self.solver = Solver(fisher.sums, damping, shifted.dtype)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """``V⁻¹ rhs``, and which units have a V that one can solve with; without a bias ``(V + m mᵀ)⁻¹ rhs``, both damped.

        Where one example has nearly all of a unit's δ², what V there is drowns in rounding: no iteration gets anywhere.
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
                f"Layer '{self.name}': the curvature has no inverse at damping=0, where inputs never vary, or examples are fewer than "
                "inputs. Use damping > 0, for example 1e-3."
            ) from None
