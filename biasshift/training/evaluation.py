"""A network's loss and error on a split, as it would be used: in evaluation mode."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.distributed import all_reduce_sum, rank, world_size
from biasshift.measure.sandbox import evaluation_mode

Examples = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> tuple[float, float]:
    """Returns the mean cross-entropy (nats) and the share of wrong answers on ``(x, y)``.

    The model is in evaluation mode, without gradients; every module's mode is left as found.

    Args:
        model: (batch, …) → logits (batch, classes).
        x: Inputs (examples, …), on the model's device.
        y: Labels (examples,), integers.
        batch_size: Bounds the memory. Up to rounding it does not change the result.

    Raises:
        ValueError: There are no examples.
    """
    means = evaluate_batches(
        model, lambda: zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return means["loss"], means["error"]


def evaluate_batches(
    model: nn.Module,
    examples: Examples,
    top: tuple[int, ...] = (1,),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Returns means over all examples, those of all processes where there are several.

    The names are ``loss``, ``error``, and ``error5`` for ``top=(1, 5)``. Sums are in float64.

    Args:
        model: Evaluated in evaluation mode, without gradients.
        examples: Returns batches (x, y); of several processes, each has its share.
        top: How many of the highest outputs count as answers. Empty: there are no classes.
        loss: (outputs, y) → one value per example; the cross-entropy in nats by default.

    Raises:
        ValueError: There are no examples.
    """
    loss = loss or partial(F.cross_entropy, reduction="none")
    sums: list[Tensor] | None = None
    with evaluation_mode(model), torch.no_grad():
        for x, y in examples():
            outputs = model(x)
            batch = [
                torch.full((), len(y), dtype=torch.float64, device=outputs.device),
                loss(outputs, y).sum(dtype=torch.float64),
                *(_wrong(outputs, y, k) for k in top),
            ]
            sums = batch if sums is None else [a + b for a, b in zip(sums, batch, strict=True)]
    count, *totals = all_reduce_sum(torch.stack(sums) if sums else None, 2 + len(top)).tolist()
    if count == 0:
        raise ValueError("An evaluation needs at least one example, got none.")
    names = ("loss", *("error" if k == 1 else f"error{k}" for k in top))
    return {name: total / count for name, total in zip(names, totals, strict=True)}


def process_share(x: Tensor) -> Tensor:
    """Returns this process's part of the examples: every so many, from its number on.

    With one process these are all of them. The parts of several differ by one example at most.
    """
    return x[rank() :: world_size()]


def _wrong(outputs: Tensor, y: Tensor, k: int) -> Tensor:
    """The number of examples whose label is not among the ``k`` highest outputs."""
    answers = (
        outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        if k > 1
        else outputs.argmax(1, keepdim=True)
    )
    return (answers != y[:, None]).all(1).sum(dtype=torch.float64)
