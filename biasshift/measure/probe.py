"""The probe: the fixed examples that a model is measured on, read in batches."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

Probe = Tensor | Iterable  # a tensor of examples, or batches x or (x, y)


def iterable(x: Any) -> Iterable:
    """Returns batches that can be iterated over, which may be a tensor.

    Raises:
        ValueError: for anything else, and for what may as well be a single batch (x, y): a tuple,
            or a list of two with the same length, as ``next(iter(loader))`` is.
    """
    if not isinstance(x, Iterable):
        raise ValueError(
            "The probe must be a tensor of examples, or an iterable of batches x or (x, y), got "
            f"{type(x).__name__}."
        )
    if isinstance(x, tuple) or (isinstance(x, list) and _may_be_one_batch(x)):
        raise ValueError(
            f"A {type(x).__name__} of tensors may be one batch (x, y) or several batches. Give x "
            "and y as two arguments, one batch as [(x, y)], or several as [(x1,), (x2,)]."
        )
    return x


def _may_be_one_batch(parts: list) -> bool:
    """Whether x, y and what may follow them are in the list, and not batches of inputs.

    Batches of inputs agree in their dtype and number of axes. Two of equal length that agree may
    still be x and y, those of an autoencoder or a language model.
    """
    if len(parts) < 2 or not isinstance(x := parts[0], Tensor) or x.dim() == 0:
        return False
    if not all(isinstance(part, Sized) and _length(part) == len(x) for part in parts):
        return False
    return len(parts) == 2 or any(
        not isinstance(part, Tensor) or (part.dtype, part.dim()) != (x.dtype, x.dim())
        for part in parts
    )


def _length(part: Sized) -> int:
    return 0 if isinstance(part, Tensor) and part.dim() == 0 else len(part)


def rereadable(x: Probe) -> Tensor | list:
    """Returns a probe that can be read several times: a one-shot iterator becomes a list.

    After the first reading nothing would be left of an iterator for the second.

    Raises:
        ValueError: for something that is not a probe.
    """
    if isinstance(x, Tensor):
        return x
    # as (x,), so that two batches of an iterator are not taken for a batch [x, y] later
    return [(batch,) if isinstance(batch, Tensor) else batch for batch in iterable(x)]


def batches(
    model: nn.Module, x: Probe, y: Any = None, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """Yields batches ``(x, y or None)`` on the model's device, in order.

    Labels that are not a tensor, as a list or an array, become one where they hold one label per
    example. Others, as the boxes of a detection data set, are passed on as they are: whoever reads
    labels refuses them.

    Args:
        x: a tensor of examples, or an iterable of batches x, (x,) or (x, y).
        y: the labels of a tensor x.
        batch_size: examples per batch; by default all of a tensor, and batches as they come.

    Raises:
        ValueError: for an empty probe, x and y that do not match, what may be one batch (x, y) or
            several, and examples with NaN or infinity.

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
            b = as_labels(b, len(a))
            yield a.to(device), b.to(device) if isinstance(b, Tensor) else b
    if empty:
        raise ValueError(
            "The probe is empty: give at least one example (an iterator that was read before is "
            "empty)."
        )


def as_labels(y: Any, examples: int) -> Any:
    """Returns labels as a tensor where they can be one, with a label per example; else as given."""
    if y is None or isinstance(y, Tensor):
        return y
    try:
        # by __array__, since an index of a pandas Series need not count from 0
        labels = torch.tensor(y.__array__() if hasattr(y, "__array__") else y)
    except Exception:  # which one depends on what the labels are
        return y
    return labels if labels.dim() and len(labels) == examples else y


def _split(x: Probe, y: Any, batch_size: int | None) -> Iterator[tuple[Any, Any]]:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"'batch_size' must be at least 1, got {batch_size}.")
    if isinstance(x, Tensor):
        y = as_labels(y, len(x))
        if isinstance(y, Tensor) and (y.dim() == 0 or len(y) != len(x)):
            raise ValueError(
                "Probe tensors x and y must have the same examples, got shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}."
            )
        size = batch_size or max(len(x), 1)
        for i in range(0, len(x), size):
            yield x[i : i + size], y[i : i + size] if isinstance(y, Tensor) else y
        return
    probe = iterable(x)
    if y is not None:
        raise ValueError("Labels y go with a tensor x: give an iterable as batches (x, y).")
    for batch in probe:
        # x, (x,) as data loaders give it, or (x, y); what follows y is not used
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        if not parts:
            raise ValueError("A batch must be a tensor x or a pair (x, y), got an empty one.")
        a, b = parts[0], parts[1] if len(parts) > 1 else None
        if batch_size is None or not isinstance(a, Tensor):
            yield a, b
        else:
            yield from _split(a, b, batch_size)
