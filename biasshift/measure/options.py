"""The options that `unit_fisher`, `gradient_gap`, `check` and `instrument` share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biasshift.fisher.samples import MEMORY_BUDGET, STORAGES
from biasshift.fisher.solver import MAX_ITERATIONS
from biasshift.measure.layer_types import Selection
from biasshift.measure.likelihoods import LABELS, LIKELIHOODS, Labels, Likelihood
from biasshift.measure.outputs import OutputChoice, check_outputs, chosen_output
from biasshift.measure.probe import InputNames

Units = Sequence[int] | Mapping[str, Sequence[int]] | None
Mask = Tensor | Callable[[Any, Any], Tensor] | None
CHOICES = {
    "likelihood": LIKELIHOODS,
    "labels": LABELS,
    "weight_sharing": ("per_example", "expand"),
    "storage": STORAGES,
    "uncovered": ("skip", "raise"),
}


@dataclass(frozen=True)
class Options:
    """How δ̄² and the unit Fisher matrices of a model are formed; `unit_fisher` explains each field.

    Raises:
        ValueError: for a value that is not one of the choices, or a number of draws below 1.
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
    class_axis: int = -1
    mask: Mask = None
    inputs: InputNames = None
    output: OutputChoice = None
    uncovered: str = "skip"
    skip: Selection = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"'{name}' must be one of {known}, got {value!r}.")
        if isinstance(self.class_axis, bool) or not isinstance(self.class_axis, int):
            raise ValueError(f"'class_axis' must be a whole number, got {self.class_axis!r}.")
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"'draws' must be a whole number of at least 1, got {self.draws!r}.")
        refuse_other_generators(self.generator)

    def outputs(self, returned: Any, examples: int) -> Tensor:
        """Returns the outputs among what the model returned, with the classes last.

        Raises:
            ValueError: as `biasshift.measure.outputs.check_outputs`.
        """
        axis = self.class_axis if self.likelihood == "categorical" else -1
        return check_outputs(chosen_output(returned, self.output), examples, axis)


def refuse_other_generators(generator: Any) -> None:
    """Raises an error for a generator of random labels that is not PyTorch's.

    Raises:
        ValueError: with the type that it has.
    """
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(
            f"'generator' must be a torch.Generator, got {type(generator).__name__}. Pass "
            "torch.Generator(device).manual_seed(…)."
        )
