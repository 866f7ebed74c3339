"""The convolutional classifiers: what the CIFAR and the ImageNet protocols share."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from biasshift.data import DataSet
from biasshift.distributed import rank, world_size
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.trial import Phase


def epoch_steps(images: int, batch_size: int) -> int:
    """Minibatches of an epoch."""
    return -(-images // batch_size)


def momentum_sgd(
    model: nn.Module, parameters: Iterator[nn.Parameter], momentum: float, decay: float
) -> torch.optim.Optimizer:
    """The paper's optimizer. L2 decay is of all parameters: the paper excepts none. The phases set
    the learning rate.
    """
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay)


def schedule(
    parts: Sequence[tuple[int, float]],
    steps: int,
    lr: float,
    change: Callable[[int, Phase], Phase] = lambda number, phase: phase,
) -> tuple[Phase, ...]:
    """Phases of (updates, share of the first learning rate), shortened or stretched to ``steps``
    updates in all.

    >>> [(phase.start, phase.lr) for phase in schedule([(30, 1.0), (70, 0.1)], steps=10, lr=0.01)]
    [(1, 0.01), (4, 0.001)]
    """
    whole = sum(updates for updates, _ in parts)
    ends = [round(end * steps / whole) for end in accumulate(updates for updates, _ in parts)]
    starts = [0, *ends[:-1]]
    found = enumerate(zip(starts, ends, parts, strict=True))
    return tuple(
        change(number, Phase(start + 1, lr * share))
        for number, (start, end, (_, share)) in found
        if end > start
    )


def scores_on_test(
    model: nn.Module, data: DataSet, images: int, batch_size: int = 250
) -> dict[str, float]:
    """Loss and error on the first test images, and on the validation images where there are some;
    shares of several processes.
    """
    found = {}
    for name, x, y in (
        ("test", data.x_test[:images], data.y_test[:images]),
        ("valid", data.x_valid[:images], data.y_valid[:images]),
    ):
        if len(x):
            own = share(x, y)
            scores = evaluate_batches(
                model, lambda own=own: zip(*(part.split(batch_size) for part in own), strict=True)
            )
            found |= {f"{name}_loss": scores["loss"], f"{name}_error": scores["error"]}
    return found


def share(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Every so many examples, from this process's number on."""
    return x[rank() :: world_size()], y[rank() :: world_size()]
