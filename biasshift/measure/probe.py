"""The probe: the fixed examples that a model is measured on, read in batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Probe = Tensor | Iterable  # a tensor of examples, or batches x or (x, y)


def iterable(x: Any) -> Iterable:
    """Returns batches that can be iterated over, which may be a tensor.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(x, Iterable):
        raise ValueError(
            "The probe must be a tensor of examples, or an iterable of batches x or (x, y), got "
            f"{type(x).__name__}."
        )
    return x


def rereadable(x: Probe) -> Tensor | list:
    """Returns a probe that can be read several times: a one-shot iterator becomes a list.

    After the first reading nothing would be left of an iterator for the second.

    Raises:
        ValueError: for something that is not a probe.
    """
    return x if isinstance(x, Tensor) else list(iterable(x))


def batches(
    model: nn.Module, x: Probe, y: Tensor | None = None, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields batches ``(x, y or None)`` on the model's device, in order.

    Args:
        x: a tensor of examples, or an iterable of batches x, (x,) or (x, y).
        y: the labels of a tensor x.
        batch_size: examples per batch; by default all of a tensor, and batches as they come.

    Raises:
        ValueError: for an empty probe, x and y that do not match, and examples with NaN or
            infinity.

    >>> [len(x) for x, y in batches(nn.Linear(2, 1), torch.ones(5, 2), batch_size=2)]
    [2, 2, 1]
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for a, b in _split(x, y, batch_size):
        if not isinstance(a, Tensor):
            kind = type(a).__name__
            raise ValueError(f"A batch must be a tensor x or a pair (x, y), got {kind}.")
        if a.is_floating_point() and not a.isfinite().all():
            raise ValueError("The probe must be finite: x holds NaN or infinity.")
        if len(a):
            empty = False
            a = a.clone() if a.is_inference() else a  # autograd cannot use an inference tensor
            yield a.to(device), None if b is None else b.to(device)
    if empty:
        raise ValueError(
            "The probe is empty: give at least one example (an iterator that was read before is "
            "empty)."
        )


def _split(
    x: Probe, y: Tensor | None, batch_size: int | None
) -> Iterator[tuple[Any, Tensor | None]]:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"'batch_size' must be at least 1, got {batch_size}.")
    if isinstance(x, Tensor):
        if y is not None and len(y) != len(x):
            raise ValueError(
                f"Probe tensors x and y must have the same examples, got {len(x)} and {len(y)}."
            )
        size = batch_size or max(len(x), 1)
        for i in range(0, len(x), size):
            yield x[i : i + size], None if y is None else y[i : i + size]
        return
    if isinstance(x, tuple):
        raise ValueError(
            "A tuple may be (x, y) or two batches: give x and y as two arguments, or a list of "
            "batches."
        )
    if y is not None:
        raise ValueError("Labels y go with a tensor x: give an iterable as batches (x, y).")
    for batch in iterable(x):
        # x, (x,) as data loaders give it, or (x, y); what follows y is not used
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        if not parts:
            raise ValueError("A batch must be a tensor x or a pair (x, y), got an empty one.")
        a, b = parts[0], parts[1] if len(parts) > 1 else None
        if batch_size is None:
            yield a, b
        else:
            yield from _split(a, b, batch_size)
