"""What a measurement is asked for, and what it returns for one layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from biasshift.fisher.unit_fisher import MAX_ITERATIONS, MEMORY_BUDGET, STORAGES, UnitFisher
from biasshift.measure import likelihoods
from biasshift.measure.likelihoods import Labels, Likelihood
from biasshift.measure.probe import Selection

Units = Sequence[int] | Mapping[str, Sequence[int]] | None
SHARING = ("per_example", "expand")


@dataclass(frozen=True)
class Options:
    """How δ̄² and the matrices are formed; one object for `unit_fisher`, `gradient_gap` and
    `instrument`.
    """

    labels: Labels = "expected"
    likelihood: Likelihood = "categorical"
    weight_sharing: str = "per_example"
    layers: Selection = None
    units: Units = None
    damping: float = 1e-4
    batch_size: int | None = None
    generator: torch.Generator | None = None
    max_passes: int = 4096
    memory_budget: int = MEMORY_BUDGET
    draws: int = 1
    storage: str = "auto"
    tolerance: float | None = None
    max_iterations: int = MAX_ITERATIONS

    def __post_init__(self) -> None:
        likelihoods.check(self.likelihood, self.labels)
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws must be a whole number of draws ≥ 1, got {self.draws!r}.")
        for name, value, known in (
            ("weight_sharing", self.weight_sharing, SHARING),
            ("storage", self.storage, STORAGES),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}."
                )


@dataclass(frozen=True)
class Measured:
    """One layer: its unit Fisher matrices, and the gradient of the mean negative log-likelihood
    where it was asked for.
    """

    fisher: UnitFisher
    g: Tensor | None = None  # (units, inputs)
    g0: Tensor | None = None  # (units,); None without a bias
