"""Training as a generator of steps: whoever iterates decides what to measure, print, store and when to stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from biasshift.data import DataSet, batches


@dataclass(frozen=True, eq=False)
class Step:
    """One completed optimizer step.

    Args:
        number: completed optimizer steps; the first is 1.
        epoch: the epoch it belongs to; the first is 1.
        loss: of its minibatch, before the step, on the device: reading it with `float` waits for the device.
    """

    number: int
    epoch: int
    loss: Float[Tensor, ""]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DataSet,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Iterator[Step]:
    """Train on `data.x_train`, one `Step` per minibatch; nothing happens until somebody iterates.

    The loop never waits for the device, so a loss that turns non-finite is found at the end of its epoch,
    before that epoch's last step is handed out. The model is put in training mode at the start of every epoch.

    Args:
        generator: shuffles the examples, one permutation per epoch.
        loss: (outputs, labels) → the mean loss of the minibatch.

    Raises:
        RuntimeError: the loss of some step was infinite or NaN; the message names the step and the learning rate.

    >>> from biasshift.data import digits
    >>> model = nn.Linear(64, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> steps = list(train(model, optimizer, digits(), epochs=2, batch_size=100, generator=torch.Generator().manual_seed(0)))
    >>> len(steps), steps[-1].number, steps[-1].epoch
    (30, 30, 2)
    """
    number = 0
    for epoch in range(1, epochs + 1):
        model.train()
        losses: list[Tensor] = []
        for x, y in batches(data.x_train, data.y_train, batch_size, generator, data.views):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            number += 1
            losses.append(value.detach())
            if len(losses) * batch_size >= len(data.x_train) // data.views:  # the epoch's last
                _refuse_divergence(losses, number, optimizer)
            yield Step(number, epoch, losses[-1])


def evaluate(
    model: nn.Module, x: Float[Tensor, "examples *inputs"], y: Int[Tensor, " examples"], batch_size: int = 1000
) -> tuple[float, float]:
    """The mean cross-entropy (nats) and the share of wrong answers on `(x, y)`, in evaluation mode, without gradients.

    Every module's mode is left as found. `batch_size` bounds the memory; up to rounding it does not change the result.

    Raises:
        ValueError: there are no examples.
    """
    if len(x) == 0:
        raise ValueError("there are no examples to evaluate on.")
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    with _evaluation_mode(model), torch.no_grad():
        for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            outputs = model(inputs)
            loss += F.cross_entropy(outputs, labels, reduction="none").sum(dtype=torch.float64)
            wrong += (outputs.argmax(1) != labels).sum()
    return loss.item() / len(x), wrong.item() / len(x)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: somebody may keep a part in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _refuse_divergence(losses: list[Tensor], number: int, optimizer: torch.optim.Optimizer) -> None:
    """Raise if any loss of the last steps, up to step `number`, is not finite. Waits for the device once."""
    values = torch.stack(losses)
    if bool(values.isfinite().all()):
        return
    first = int((~values.isfinite()).nonzero()[0])
    step = number - len(losses) + first + 1
    rates = ", ".join(sorted({f"{float(group['lr']):g}" for group in optimizer.param_groups}))
    raise RuntimeError(
        f"the loss became {values[first].item()} at step {step} with learning rate {rates}: training diverged; lower the rate."
    )
