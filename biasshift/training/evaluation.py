"""A network's loss and error on a split, as it would be used: in evaluation mode."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.distributed import all_reduce_sum
from biasshift.measure.sandbox import evaluation_mode

Examples = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> tuple[float, float]:
    """The mean cross-entropy (nats) and the share of wrong answers on `(x, y)`, in evaluation mode,
    without gradients.

    Every module's mode is left as found. `batch_size` bounds the memory; up to rounding it does not
    change the result.

    Raises:
        ValueError: there are no examples.
    """
    found = evaluate_batches(
        model, lambda: zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return found["loss"], found["error"]


def evaluate_batches(
    model: nn.Module,
    examples: Examples,
    top: tuple[int, ...] = (1,),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Means over all examples, those of all processes where there are several: ``loss``, ``error``,
    and ``error5`` for ``top=(1, 5)``.

    Args:
        examples: returns batches (x, y); of several processes, each has its share.
        top: how many of the highest outputs count as answers. Empty: there are no classes.
        loss: (outputs, y) → one value per example; the cross-entropy in nats by default.

    Raises:
        ValueError: there are no examples.
    """
    loss = loss or _cross_entropy
    sums: list[Tensor] | None = None
    with evaluation_mode(model), torch.no_grad():
        for x, y in examples():
            outputs = model(x)
            values = [
                loss(outputs, y).sum(dtype=torch.float64),
                *(_wrong(outputs, y, k) for k in top),
            ]
            batch = [
                torch.tensor(float(len(y)), dtype=torch.float64, device=outputs.device),
                *values,
            ]
            sums = batch if sums is None else [a + b for a, b in zip(sums, batch, strict=True)]
    totals = all_reduce_sum(torch.stack(sums) if sums else None, 2 + len(top)).tolist()
    if totals[0] == 0:
        raise ValueError("there are no examples to evaluate on.")
    names = ("loss", *("error" if k == 1 else f"error{k}" for k in top))
    return {name: total / totals[0] for name, total in zip(names, totals[1:], strict=True)}


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none")


def _wrong(outputs: Tensor, y: Tensor, k: int) -> Tensor:
    answers = (
        outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        if k > 1
        else outputs.argmax(1, keepdim=True)
    )
    return (answers != y[:, None]).all(1).sum(dtype=torch.float64)
