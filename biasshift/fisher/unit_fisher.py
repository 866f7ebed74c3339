"""The unit Fisher matrices of a layer, and the terms of Theorems 1 and 2 that follow from them."""

import math
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed as dist

from biasshift.fisher import files, summary
from biasshift.fisher.all_reduce import all_reduced
from biasshift.fisher.held import HeldSums, joined, summed
from biasshift.fisher.inverses import (
    SINGLE_TOLERANCE as SINGLE_TOLERANCE,
    TOLERANCE as TOLERANCE,
    Inverses,
)
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.refusals import check_samples, check_summands
from biasshift.fisher.sample_size import SAMPLES_PER_INPUT as SAMPLES_PER_INPUT
from biasshift.fisher.samples import MEMORY_BUDGET, STORAGES, ImplicitSums
from biasshift.fisher.solver import MAX_ITERATIONS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class UnitFisher(Inverses):
    """The unit Fisher matrices ``F = E_p(δ² ã ãᵀ)`` of all units of one layer, ``ã = (a, 1)``.

    Everything is a function of ``(c, μ, m, V)``: the mean squared error, the activations' mean
    under the data p and under ``q ∝ δ² p``, and their covariance under q. Make one with
    `from_samples` or `biasshift.unit_fisher`. Results have the dtype and device of the samples;
    sums and solves are float64 inside.

    A unit with ``c = 0`` is ``dead``, a live one with ``V = 0`` is ``singular``: both have NaN
    where their numbers are undefined. Where V is singular otherwise, reading an inverse quantity
    with ``damping = 0`` raises ValueError. A bias without influence is ``bias_inert``: its unit has
    no m, and the natural gradient of its weights alone.

    Source: section 3 and appendix of the ELU paper.
    """

    sums: WeightedSums | ImplicitSums = field(repr=False)
    damping: float = 0.0
    bias: bool = True
    dtype: torch.dtype = torch.float64
    name: str = ""
    # the rule that made δ²: "expected", "sampled", "empirical" (which is another matrix), or given
    labels: str = "given"
    # the variance of Σ δ² from drawing labels, (units,), float64
    label_noise: Tensor | None = field(default=None, repr=False)
    # of the relative residuals of the implicit storage; None for that of the dtype
    tolerance: float | None = None
    max_iterations: int = MAX_ITERATIONS

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, int | float) and 0 <= self.damping < math.inf):
            raise ValueError(f"'damping' must be a finite number ≥ 0, got {self.damping!r}.")
        if not (self.tolerance is None or 0 < self.tolerance < 1):
            raise ValueError(f"'tolerance' must lie in (0, 1), got {self.tolerance!r}.")
        if self.max_iterations < 1:
            raise ValueError(f"'max_iterations' must be ≥ 1, got {self.max_iterations!r}.")

    @classmethod
    def from_samples(
        cls,
        a: Tensor,
        delta2: Tensor,
        damping: float = 0.0,
        bias: bool = True,
        name: str = "",
        *,
        storage: str = "auto",
        tolerance: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        memory_budget: int = MEMORY_BUDGET,
    ) -> "UnitFisher":
        """Returns the matrices of a layer from its activations and its units' squared errors.

        Args:
            a: (samples, inputs), the incoming activations.
            delta2: (samples, units), ``δ̄² = E_y δ²`` of every example and unit, ≥ 0.
            damping: λ, relative to the mean variance of the inputs; enters the inverse quantities
                only.
            bias: whether the units have a bias to correct with.
            name: the layer's name in error messages.
            storage: ``"auto"`` keeps the samples while they are fewer numbers than the blocks, and
                is the fastest that fits into ``memory_budget``. ``"dense"`` keeps the blocks,
                ``"implicit"`` the samples, and solves by iteration.
            tolerance: the relative residual of every solve by iteration, in (0, 1). By default it
                is 1e-8 in double precision and 1e-5 in single.
            max_iterations: after these, a unit that has not converged gets NaN, and a warning.
            memory_budget: bytes for blocks; with the implicit storage, for the blocks of the few
                units that are asked for.

        Raises:
            ValueError: when shapes or dtypes do not fit, or a number is negative or not finite.

        >>> a, delta2 = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> fisher = UnitFisher.from_samples(a, delta2)
        >>> fisher.mean_q, fisher.var_q, fisher.s
        (tensor([[1.]]), tensor([[[1.]]]), tensor([2.]))
        """
        if storage not in STORAGES:
            names = ", ".join(map(repr, STORAGES))
            raise ValueError(f"'storage' must be one of {names}, got {storage!r}.")
        check_samples(a, delta2)
        return cls(
            summed(a, delta2, storage, memory_budget),
            damping,
            bias,
            a.dtype,
            name,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def __add__(self, other: "UnitFisher") -> "UnitFisher":
        """The matrices of both sets of samples together, exactly."""
        if not isinstance(other, UnitFisher):
            return NotImplemented
        mine, theirs = ((f.sums.first.shape, f.damping, f.bias, f.labels) for f in (self, other))
        check_summands(mine, theirs, self.storage, other.storage)
        noise = (
            None
            if self.label_noise is None or other.label_noise is None
            else self.label_noise + other.label_noise
        )
        return replace(self, sums=joined(self.sums, other.sums), label_noise=noise)

    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> "UnitFisher":
        """Returns the matrices of the samples of all processes together, exactly.

        All processes must call it, and all get the same result. Nothing is approximated: the sums
        of every process move to one reference, and are added.

        Args:
            group: the processes of torch.distributed; all of them by default.

        Raises:
            RuntimeError: when torch.distributed is not initialized, or samples were not kept.
            ValueError: when the processes do not hold the same layer.
        """
        what = f"'{self.name}' at damping={self.damping}, bias={self.bias}, labels={self.labels!r}"
        sums, noise = all_reduced(self.sums, self.label_noise, what, group)
        return replace(self, sums=sums, label_noise=noise)

    def damped(self, damping: float) -> "UnitFisher":
        """Returns the same moments with another damping, which replaces the present one.

        Nothing is measured again. The sums are shared with this object, and only inverse quantities
        (s, k, k0, coupling, corrected mean, natural gradient) change.

        Raises:
            ValueError: when the damping is negative or not finite.
        """
        return replace(self, damping=damping)

    @property
    def storage(self) -> str:
        """What is kept: ``"dense"`` blocks, ``"implicit"`` samples, or by ``"auto"`` what is less.

        From samples, blocks are formed when they are read, with the implicit storage within the
        memory budget. There inverse quantities come by iteration. Otherwise they are as exact as
        from blocks, by whatever costs least.
        """
        if isinstance(self.sums, HeldSums):
            return "auto"
        return "implicit" if isinstance(self.sums, ImplicitSums) else "dense"

    # -- to look at and to keep --------------------------------------------------------------------

    def __repr__(self) -> str:
        return summary.line(self)

    def _repr_html_(self) -> str:
        return summary.page(self)

    def table(self) -> "pd.DataFrame":
        """Returns the numbers of every unit, one row each.

        Columns are ``unit``, ``mean_delta2``, ``s``, ``k``, ``k0``, ``coupling``,
        ``effective_samples``, and the flags ``dead``, ``singular``, ``bias_inert``, ``imprecise``
        and ``reliable``, which properties of these names explain.

        Raises:
            ValueError: when V has no inverse and damping is 0.
        """
        return summary.table(self)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes everything to a file, which `load` reads; a file that is there is replaced.

        The format is that of safetensors: numbers and their names, of which nothing is executed.

        Raises:
            ValueError: when the samples did not fit into memory and are read again from the probe.
        """
        files.save(self, path)

    @classmethod
    def load(
        cls, path: "str | os.PathLike[str]", device: "torch.device | str" = "cpu"
    ) -> "UnitFisher":
        """Returns what `save` has written, to the last bit, on a device.

        Raises:
            ValueError: when the file is damaged, or is not one of `save`.
        """
        return files.load(cls, path, device)
