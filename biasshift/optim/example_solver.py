"""Solves with the curvature of layers too large for matrices, by their latest examples."""

from functools import partial

import torch
from torch import Tensor

from biasshift.fisher.cholesky import Singular, sherman_morrison
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.solver import Solver
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.optim.running_sums import RunningSums

TOLERANCE, SINGLE_TOLERANCE = 1e-8, 1e-5  # relative residuals
ITERATIONS = 200


class ExampleSolver:
    """Solves with ``V = Var_q(a)`` of the latest examples, without forming it.

    It stands in for `Inverse` where a layer has too many inputs for matrices: directly where the
    examples are few, by iteration where they are many.
    """

    def __init__(self, name: str, sums: RunningSums, damping: float, bias: bool) -> None:
        shifted, delta2 = sums.parts["samples"]
        fisher = UnitFisher.from_samples(shifted, delta2, storage="implicit")
        assert isinstance(fisher.sums, ImplicitSums)
        self.name, self.bias = name, bias
        self.mean = (fisher.sums.mean_q + sums.reference).nan_to_num(nan=0.0).double()
        tolerance = TOLERANCE if shifted.dtype == torch.float64 else SINGLE_TOLERANCE
        solver = Solver(fisher.sums, damping, shifted.dtype)
        self._solve = partial(solver.solve, tolerance=tolerance, max_iterations=ITERATIONS)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``V⁻¹ rhs``, (units, inputs), and which units have a V to solve with.

        V is damped; without a bias it is ``V + m mᵀ``. Where one example has nearly all of a
        unit's δ², V is lost in rounding, and the iteration does not converge: not usable.

        Raises:
            ValueError: If a V has no inverse and there is no damping.
        """
        try:
            wide = rhs.double()
            solve = self._solve
            x = solve(wide) if self.bias else sherman_morrison(solve, wide, self.mean)
        except Singular as singular:
            raise no_inverse(self.name, singular.units, len(rhs)) from None
        usable = x.isfinite().all(1)
        return torch.where(usable[:, None], x, 0.0).to(rhs.dtype), usable


def no_inverse(name: str, singular: int, units: int) -> ValueError:
    """Returns the error of a curvature that is singular without damping."""
    return ValueError(
        f"Layer '{name}': the curvature of {singular} of {units} units has no inverse at "
        "damping=0, because inputs never vary or examples are fewer than inputs. "
        "Use damping > 0, for example 1e-3."
    )
