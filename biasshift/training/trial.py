"""What an experiment makes of a setting: a network, its data, and what is to be measured along the
way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from biasshift.data.stream import Stream
from biasshift.measure.layer_types import WeightLayer, unit_count
from biasshift.precision import Precision
from biasshift.training.step import Loss

if TYPE_CHECKING:
    import pandas as pd

Probe = tuple[Tensor, Tensor]
Exist = Literal["refuse", "replace", "resume"]
Quantity = Literal["activations", "bias_shift", "fisher", "gap"]


@dataclass(frozen=True)
class Phase:
    """From step ``start`` on, the first being 1: a learning rate, and dropout in ``where`` with
    rates times ``factor``.
    """

    start: int
    lr: float
    where: Literal["last", "all"] = "last"
    factor: float = 1.0


@dataclass(frozen=True)
class ProbeSchedule:
    """Measurements on a probe every so many steps: what `biasshift.instrument` is told."""

    probe: Probe
    every: int
    quantities: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """An examination that happens once: ``examine`` when ``loss`` gets to ``equal_loss``, looked at
    every ``every`` steps.
    """

    every: int
    equal_loss: float
    loss: Callable[[nn.Module], float]
    examine: Callable[[nn.Module, int], "pd.DataFrame"]


@dataclass(frozen=True)
class Trial:
    """One run to be trained and measured.

    Args:
        config: what the run folder records: a dataclass of JSON values, with ``seed``.
        make_optimizer: (model, its parameters) → optimizer.
        stream: the minibatches; their shares, of several processes.
        steps: completed steps at the end.
        phases: learning rates along the way, the first from step 1.
        score: model → numbers of the whole network, such as ``train_loss``; ``score_every`` steps,
            and at the end.
        enter: called with the model when a phase begins.
        closing: model, step → rows measured once, at the end.
    """

    config: Any
    model: nn.Module
    make_optimizer: Callable[[nn.Module, Iterator[nn.Parameter]], Optimizer]
    stream: Stream
    steps: int
    phases: tuple[Phase, ...]
    score: Callable[[nn.Module], dict[str, float]]
    score_every: int
    schedules: Sequence[ProbeSchedule] = ()
    exam: Exam | None = None
    loss: Loss = F.cross_entropy
    enter: Callable[[nn.Module, Phase], None] = lambda model, phase: None
    closing: "Callable[[nn.Module, int], pd.DataFrame] | None" = None


@dataclass(frozen=True)
class Execution:
    """How a trial is computed; the meaning of its numbers does not depend on it."""

    precision: Precision = "float32"
    compiled: bool = False
    graphed: bool = False
    channels_last: bool = False
    checkpoint_seconds: float = 30.0
    keep_weights: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a run is: completed steps of it, of how many, and its last minibatch's loss."""

    run: str
    step: int
    steps: int
    loss: float


Report = Callable[[Progress], None]


# -- what the large experiments measure along a run --------------------------------------------


@dataclass(frozen=True)
class Instrumentation:
    """Every ``every`` steps on the first ``examples`` of a probe; Fisher matrices of ``units`` of
    every layer.
    """

    quantities: tuple[Quantity, ...]
    every: int
    examples: int
    units: int
    damping: float
    batch_size: int

    def schedules(
        self, model: nn.Module, probe: Probe, labels: str, likelihood: str = "categorical"
    ) -> list[ProbeSchedule]:
        """The measurements of a model; none without quantities."""
        if not self.quantities:
            return []
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, WeightLayer)
        }
        units = {
            name: evenly_spaced(unit_count(module), self.units) for name, module in layers.items()
        }
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "layers": _weights_and_activations,
        }
        if {"fisher", "gap"} & set(self.quantities):
            generator = torch.Generator(probe[0].device).manual_seed(0)
            options |= {
                "units": units,
                "damping": self.damping,
                "labels": labels,
                "likelihood": likelihood,
                "generator": generator,
            }
        x, y = (part[: self.examples] for part in probe)
        return [ProbeSchedule((x, y), self.every, tuple(self.quantities), options)]


def _weights_and_activations(name: str, module: nn.Module) -> bool:
    """Not the paddings, poolings and dropouts, which have mean outputs too."""
    return isinstance(module, WeightLayer) or name.startswith("act")


def evenly_spaced(width: int, count: int) -> list[int]:
    """``count`` indices from 0 on, as far apart as they go; all of them where there are no more."""
    count = min(count, width)
    return [i * width // count for i in range(count)]
