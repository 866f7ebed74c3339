"""The convolutional classifiers: what the CIFAR and the ImageNet protocols share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from biasshift.data import Augment, DataSet, Scale, TensorStream, cifar10, cifar100, synthetic_cifar, whitened
from biasshift.nets import set_dropout
from biasshift.ranges import at_least_one, distinct, not_negative, positive, shares
from biasshift.training.evaluating import evaluate_batches
from biasshift.training.processes import rank, world
from biasshift.trials import Phase, Trial
from biasshift.watching import Quantity, Watching

Geometry = Literal["same", "caffe"]


@dataclass(frozen=True)
class Setting:
    """One run on small images. Runs with the same seed start from the same weights and see the same batches."""

    experiment: str
    dataset: str
    activation: str
    seed: int
    steps: int
    epochs: float  # what so many steps are
    batch_size: int
    lr: float  # the first
    momentum: float
    weight_decay: float
    geometry: Geometry
    batch_norm: bool
    preprocessing: str
    augmented: bool
    init: str
    width: float
    score_every: int  # steps
    test_images: int  # the first ones, that scores are taken on along the run; at the end on all
    probe_size: int
    every: int  # steps between measurements
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float


def small_images(setting: Setting, data: DataSet, model: nn.Module, phases: tuple[Phase, ...]) -> Trial:
    """The minibatches and measurements of a CIFAR network."""
    augment = Augment(pad=4) if setting.augmented else None
    stream = TensorStream(data.x_train, data.y_train, setting.batch_size, setting.seed, augment=augment, rank=rank(), world=world())
    watching = Watching(setting.quantities, setting.every, setting.probe_size, setting.units_measured, setting.damping, 250)
    probe = data.x_train[: setting.probe_size], data.y_train[: setting.probe_size]
    return Trial(
        setting,
        model.to(data.x_train.device),
        partial(momentum_sgd, momentum=setting.momentum, decay=setting.weight_decay),
        stream,
        setting.steps,
        phases,
        score=partial(scores_on_test, data=data, images=setting.test_images),
        score_every=setting.score_every,
        watches=watching.watches(model, probe, labels="expected" if data.classes <= 10 else "sampled"),
        enter=lambda module, phase: set_dropout(module, phase.where, phase.factor),
    )


def loaded(options: Any) -> DataSet:
    """CIFAR-10 or CIFAR-100, checked and preprocessed, on the device; or something of its shape."""
    data = synthetic_cifar() if options.smoke else {"cifar10": cifar10, "cifar100": cifar100}[options.dataset](options.data)
    if options.preprocessing == "gcn-zca" and not options.smoke:  # whose few images have no covariance to speak of
        return whitened(data, options.data).to(options.where())
    scale = Scale(mean=Scale()(data.x_train).mean(0))
    return replace(data, **{name: scale(getattr(data, name)) for name in ("x_train", "x_valid", "x_test")}).to(options.where())


def checked(options: Any) -> None:
    """Refuses options out of their range."""
    options.check()
    at_least_one(options, "seeds", "steps", "batch_size", "score_every", "test_images", "every", "probe", "units")
    positive(options, "lr")
    shares(options, "momentum")
    not_negative(options, "weight_decay", "damping")
    distinct("activation", options.activation)


def smoked(setting: Setting) -> Setting:
    """A tiny version of a run."""
    return replace(setting, steps=6, epochs=0.6, batch_size=20, width=0.03, score_every=3, every=3, probe_size=20, test_images=20)


def epoch_steps(images: int, batch_size: int) -> int:
    """Minibatches of an epoch."""
    return -(-images // batch_size)


def momentum_sgd(model: nn.Module, parameters: Iterator[nn.Parameter], momentum: float, decay: float) -> torch.optim.Optimizer:
    """The paper's optimizer. L2 decay is of all parameters: the paper excepts none. The phases set the learning rate."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay)


def schedule(
    parts: Sequence[tuple[int, float]], steps: int, lr: float, change: Callable[[int, Phase], Phase] = lambda number, phase: phase
) -> tuple[Phase, ...]:
    """Phases of (updates, share of the first learning rate), shortened or stretched to ``steps`` updates in all.

    >>> [(phase.start, phase.lr) for phase in schedule([(30, 1.0), (70, 0.1)], steps=10, lr=0.01)]
    [(1, 0.01), (4, 0.001)]
    """
    whole = sum(updates for updates, _ in parts)
    ends = [round(end * steps / whole) for end in accumulate(updates for updates, _ in parts)]
    starts = [0, *ends[:-1]]
    found = enumerate(zip(starts, ends, parts, strict=True))
    return tuple(change(number, Phase(start + 1, lr * share)) for number, (start, end, (_, share)) in found if end > start)


def scores_on_test(model: nn.Module, data: DataSet, images: int, batch_size: int = 250) -> dict[str, float]:
    """Loss and error on the first test images, and on the validation images where there are some; shares of several processes."""
    found = {}
    for name, x, y in (("test", data.x_test[:images], data.y_test[:images]), ("valid", data.x_valid[:images], data.y_valid[:images])):
        if len(x):
            own = share(x, y)
            scores = evaluate_batches(model, lambda own=own: zip(*(part.split(batch_size) for part in own), strict=True))
            found |= {f"{name}_loss": scores["loss"], f"{name}_error": scores["error"]}
    return found


def share(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Every so many examples, from this process's number on."""
    return x[rank() :: world()], y[rank() :: world()]
