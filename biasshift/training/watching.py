"""What the large experiments measure along a run, as options."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from biasshift.measure.layer_types import WeightLayer, unit_count
from biasshift.training.trial import Probe, Watch

Quantity = Literal["activations", "bias_shift", "fisher", "gap"]


@dataclass(frozen=True)
class Watching:
    """Every ``every`` steps on the first ``examples`` of a probe; Fisher matrices of ``units`` of every layer."""

    quantities: tuple[Quantity, ...]
    every: int
    examples: int
    units: int
    damping: float
    batch_size: int

    def watches(self, model: nn.Module, probe: Probe, labels: str, likelihood: str = "categorical") -> list[Watch]:
        """The measurements of a model; none without quantities."""
        if not self.quantities:
            return []
        layers = {name: module for name, module in model.named_modules() if isinstance(module, WeightLayer)}
        units = {name: evenly_spaced(unit_count(module), self.units) for name, module in layers.items()}
        options: dict[str, Any] = {"batch_size": self.batch_size, "layers": _weights_and_activations}
        if {"fisher", "gap"} & set(self.quantities):
            generator = torch.Generator(probe[0].device).manual_seed(0)
            options |= {"units": units, "damping": self.damping, "labels": labels, "likelihood": likelihood, "generator": generator}
        x, y = (part[: self.examples] for part in probe)
        return [Watch((x, y), self.every, tuple(self.quantities), options)]


def _weights_and_activations(name: str, module: nn.Module) -> bool:
    """Not the paddings, poolings and dropouts, which have mean outputs too."""
    return isinstance(module, WeightLayer) or name.startswith("act")


def evenly_spaced(width: int, count: int) -> list[int]:
    """``count`` indices from 0 on, as far apart as they go; all of them where there are no more."""
    count = min(count, width)
    return [i * width // count for i in range(count)]
