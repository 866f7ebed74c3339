"""The convolutional classifiers: what the CIFAR and the ImageNet experiments share."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import nn

from biasshift.data import DataSet
from biasshift.nets.initialization import Init
from biasshift.training.evaluation import evaluate_batches, process_share
from biasshift.training.trial import Phase

# open: the paper names an initialization for MNIST alone. He's on every layer makes the first loss
# of these networks 26 to 40 where the paper's curves start at ln 100 = 4.6: max-pooling, dropout
# and activations' second moments let net inputs grow to an SD of 15.
INIT: Init = "normal"
LAST_INIT = 0.001


def epoch_steps(images: int, batch_size: int) -> int:
    """Returns the minibatches of an epoch; the last one may be shorter.

    >>> epoch_steps(images=50_000, batch_size=64)
    782
    """
    return -(-images // batch_size)


def momentum_sgd(
    model: nn.Module, parameters: Iterator[nn.Parameter], momentum: float, decay: float
) -> torch.optim.Optimizer:
    """Returns the paper's optimizer; the phases set its learning rate.

    L2 decay is of all parameters: the paper excepts none.

    Args:
        model: Not used: the steps need no hooks on it.
        parameters: Those of the model.
        momentum: Of the running sum of gradients.
        decay: Times a parameter, added to its gradient.
    """
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay)


def phases_of(
    schedule: Sequence[tuple[int, float]],
    steps: int,
    lr: float,
    change: Callable[[int, Phase], Phase] = lambda number, phase: phase,
) -> tuple[Phase, ...]:
    """Returns the phases of a learning-rate schedule, shortened or stretched to ``steps`` updates.

    A part that is left without an update is left out.

    Args:
        schedule: (updates, share of the first learning rate) of every part.
        steps: Updates in all.
        lr: The first learning rate.
        change: (number of the part, its phase) → the phase, such as one with other dropout.

    >>> [(phase.start, phase.lr) for phase in phases_of([(30, 1.0), (70, 0.1)], steps=10, lr=0.01)]
    [(1, 0.01), (4, 0.001)]
    """
    updates, shares = zip(*schedule, strict=True)
    ends = [round(end * steps / sum(updates)) for end in accumulate(updates)]
    parts = enumerate(zip([0, *ends[:-1]], ends, shares, strict=True))
    return tuple(
        change(number, Phase(start + 1, lr * share))
        for number, (start, end, share) in parts
        if end > start
    )


def scores_on_test(
    model: nn.Module, data: DataSet, images: int, batch_size: int = 250
) -> dict[str, float]:
    """Returns loss and error on the test images, and on validation images where there are some.

    Args:
        model: Evaluated in evaluation mode.
        data: With several processes each evaluates its share, and all get the means.
        images: Of either set, the first ones.
        batch_size: Bounds the memory.
    """
    scores = {}
    for name, x, y in (
        ("test", data.x_test[:images], data.y_test[:images]),
        ("valid", data.x_valid[:images], data.y_valid[:images]),
    ):
        if len(x):
            own = [process_share(part).split(batch_size) for part in (x, y)]
            means = evaluate_batches(model, lambda own=own: zip(*own, strict=True))
            scores |= {f"{name}_loss": means["loss"], f"{name}_error": means["error"]}
    return scores
