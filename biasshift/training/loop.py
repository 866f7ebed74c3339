"""Training as a generator of steps.

Whoever iterates decides what to measure, print and store, and when to stop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.data.stream import Stream
from biasshift.distributed import all_reduce_sum, is_distributed

# steps: the longest that a diverged training continues unnoticed, when epochs are longer
CHECK_EVERY = 500

Update = Callable[[Tensor, Tensor], Tensor]


class Diverged(RuntimeError):
    """The loss was infinite or NaN: usually the learning rate is too large.

    The message names the first such step. In an ensemble the losses of all members were.
    """


@dataclass(frozen=True, eq=False)
class Step:
    """One completed optimizer step.

    Args:
        number: Completed optimizer steps; the first is 1.
        epoch: The epoch it belongs to; the first is 1.
        loss: Of its minibatch, before the step, on the device: reading it with `float` waits for
            the device. One per member of an ensemble.
    """

    number: int
    epoch: int
    loss: Float[Tensor, "*members"]


def train(
    update: Update,
    stream: Stream,
    *,
    steps: int,
    start: int = 0,
    before_step: Callable[[int], None] = lambda number: None,
) -> Iterator[Step]:
    """Trains on a stream of minibatches and yields one `Step` for each.

    Nothing happens until somebody iterates. The loop never waits for the device, so a loss that
    turns non-finite is found at the end of its epoch or after 500 steps, before that last step is
    yielded.

    Args:
        update: (x, y) → the loss of the minibatch; makes one optimizer step. See `Gradient` and
            `Ensemble`.
        stream: The minibatches of every epoch.
        steps: Completed steps at the end, from the first of all.
        start: Completed steps at the beginning: the stream continues behind them.
        before_step: Called with the number of the step to come.

    Raises:
        Diverged: The loss of some step was infinite or NaN, in an ensemble that of every member;
            names the step.

    >>> from biasshift.data import TensorStream, digits
    >>> from biasshift.training import Gradient
    >>> model = torch.nn.Linear(64, 10)
    >>> update = Gradient(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> data = digits()
    >>> stream = TensorStream(data.x_train, data.y_train, batch_size=100, seed=0)
    >>> steps = list(train(update, stream, steps=30))
    >>> len(steps), steps[-1].number, steps[-1].epoch
    (30, 30, 2)
    """
    epoch_steps, number = len(stream), start
    losses: list[Tensor] = []
    while number < steps:
        epoch, done = divmod(number, epoch_steps)
        for x, y in stream.epoch(epoch + 1, start=done):
            before_step(number + 1)
            loss = update(x, y).detach()
            losses.append(loss)
            number += 1
            if number == steps or number % epoch_steps == 0 or len(losses) == CHECK_EVERY:
                _refuse_divergence(losses, number)
                losses = []
            yield Step(number, epoch + 1, loss)
            if number == steps:
                return


def _refuse_divergence(losses: list[Tensor], number: int) -> None:
    """Raises if any loss of the last steps, up to step `number`, is not finite.

    Waits for the device once.
    """
    values = torch.stack(losses)
    values = values[:, None] if values.dim() == 1 else values
    if is_distributed():  # or the one process that finds it would leave the others waiting
        values = all_reduce_sum(values.double().flatten(), values.numel()).reshape(values.shape)
    diverged = ~values.isfinite().any(1)
    if bool(diverged.any()):
        first = int(diverged.nonzero()[0])
        step = number - len(losses) + first + 1
        raise Diverged(
            f"The loss became {values[first, 0].item()} at step {step}: training diverged; lower "
            "the learning rate."
        )
