"""What an experiment makes of a config: a network, its data, and what is measured along the run."""

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

if TYPE_CHECKING:  # every experiment imports this file, and the help of a command needs no tables
    import pandas as pd

Probe = tuple[Tensor, Tensor]
Exist = Literal["refuse", "replace", "resume"]
Quantity = Literal["activations", "bias_shift", "fisher", "gap"]

# -- what is trained and measured --------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A learning rate and dropout from one step on.

    Args:
        start: The first step of the phase; that of a run is 1.
        lr: Learning rate of all parameter groups.
        where: Dropout in the last layer of every stack, or in all layers.
        factor: Multiplies the network's dropout rates.
    """

    start: int
    lr: float
    where: Literal["last", "all"] = "last"
    factor: float = 1.0


@dataclass(frozen=True)
class ProbeSchedule:
    """Measurements on a probe every so many steps: the arguments of `biasshift.instrument`.

    Several processes share the probe, and each measures its part of it.
    """

    probe: Probe
    every: int
    quantities: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """An examination that happens once, as soon as the loss has come down to a value.

    Args:
        every: Steps between two evaluations of the loss.
        equal_loss: The value, in the unit of the loss, such as nats.
        loss: (model) → the loss that is compared with it.
        examine: (model, step) → the rows that are recorded.
    """

    every: int
    equal_loss: float
    loss: Callable[[nn.Module], float]
    examine: Callable[[nn.Module, int], "pd.DataFrame"]


@dataclass(frozen=True)
class Trial:
    """One run to be trained and measured.

    Args:
        config: What the run folder records: a dataclass of JSON values, with ``seed``.
        model: On the device that it is trained on.
        make_optimizer: (model, its parameters) → optimizer.
        stream: The minibatches; their shares, of several processes.
        steps: Completed steps at the end.
        phases: Learning rates along the way, the first from step 1.
        score: (model) → numbers of the whole network, such as ``train_loss``.
        score_every: Steps between two scores; there is one at the end too.
        schedules: Measurements on probes along the run.
        exam: An examination, if there is one.
        loss: (outputs, y) → the mean loss of a minibatch.
        enter: Called with the model when a phase begins.
        at_end: (model, step) → rows measured once, at the end.
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
    at_end: "Callable[[nn.Module, int], pd.DataFrame] | None" = None


# -- how it is computed ------------------------------------------------------------------------

NO_TENSORBOARD = "--tensorboard needs TensorBoard: pip install tensorboard, or leave it out."


@dataclass(frozen=True)
class Execution:
    """How a trial is computed; the meaning of its numbers does not depend on it.

    Args:
        precision: Of training: measurements are always in float32, their sums in float64.
        compiled: Train through ``torch.compile``.
        graphed: Record training steps as CUDA graphs, see `cuda_graphs.GraphedStep`.
        channels_last: The memory format of convolutions.
        checkpoint_seconds: Least time between two checkpoints.
        keep_weights: Save a checkpoint at the end, and leave it in the run folder.
        tensorboard: Write the scores for TensorBoard too.
    """

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
    """Measurements of every layer along a run, on one probe.

    Args:
        quantities: What is measured; nothing where it is empty.
        every: Steps between two measurements.
        examples: Of the probe, the first ones.
        units: Units of every layer, evenly spaced, in the unit Fisher matrices.
        damping: Of those matrices.
        batch_size: Examples that are measured at once: bounds the memory.
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
        """Returns the measurements of a model: one schedule, or none without quantities.

        Args:
            model: Its weight layers and activations are measured.
            probe: (x, y), of which the first examples are taken.
            labels: The label rule of the unit Fisher matrices. Sampled labels come from a
                generator of their own, with seed 0.
            likelihood: What the outputs are parameters of.
        """
        if not self.quantities:
            return []
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "layers": _weights_and_activations,
        }
        if {"fisher", "gap"} & set(self.quantities):
            options |= {
                "units": {
                    name: evenly_spaced(unit_count(module), self.units)
                    for name, module in model.named_modules()
                    if isinstance(module, WeightLayer)
                },
                "damping": self.damping,
                "labels": labels,
                "likelihood": likelihood,
                "generator": torch.Generator(probe[0].device).manual_seed(0),
            }
        x, y = (part[: self.examples] for part in probe)
        return [ProbeSchedule((x, y), self.every, tuple(self.quantities), options)]


def _weights_and_activations(name: str, module: nn.Module) -> bool:
    """Not the paddings, poolings and dropouts, which have mean outputs too."""
    return isinstance(module, WeightLayer) or name.startswith("act")


def evenly_spaced(width: int, count: int) -> list[int]:
    """Returns ``count`` indices below ``width``, from 0 on, as far apart as they go.

    Where there are no more than ``count``, it returns all of them.

    >>> evenly_spaced(10, 4)
    [0, 2, 5, 7]
    """
    count = min(count, width)
    return [i * width // count for i in range(count)]
