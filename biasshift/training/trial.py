"""What an experiment makes of a setting: a network, its data, and what is to be measured along the way."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from biasshift.data.stream import Stream
from biasshift.training.step import Loss, Precision

if TYPE_CHECKING:
    import pandas as pd

Probe = tuple[Tensor, Tensor]
Exist = Literal["refuse", "replace", "resume"]


@dataclass(frozen=True)
class Phase:
    """From step ``start`` on, the first being 1: a learning rate, and dropout in ``where`` with rates times ``factor``."""

    start: int
    lr: float
    where: Literal["last", "all"] = "last"
    factor: float = 1.0


@dataclass(frozen=True)
class Watch:
    """Measurements on a probe every so many steps: what `biasshift.instrument` is told."""

    probe: Probe
    every: int
    quantities: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """An examination that happens once: ``examine`` when ``loss`` gets to ``equal_loss``, looked at every ``every`` steps."""

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
        score: model → numbers of the whole network, such as ``train_loss``; ``score_every`` steps, and at the end.
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
    watches: Sequence[Watch] = ()
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
