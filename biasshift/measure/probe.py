"""The probe: the fixed examples that a model is measured on, read in batches."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biasshift.measure.examples import Examples, Inputs, arguments_as_given, mapped, tensors

# A tensor of examples, several or a dict of them, or batches x, (x, y) or dicts.
Probe = Tensor | Mapping | Iterable
InputNames = int | Sequence[str] | None
LABEL_KEYS = ("labels", "label")  # of a dict batch, as data sets and collators name them


class Batch(NamedTuple):
    """The inputs of some examples, their labels, and which positions count."""

    x: Inputs
    y: Any = None
    mask: Any = None  # None where all positions count
    # Whether the model is given the labels, too, and may say how it reads them by its loss.
    y_in_call: bool = False


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
            "and y as two arguments, one batch as [(x, y)], or several as [(x1,), (x2,)]. Inputs "
            "of a model with several take inputs=2."
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


def rereadable(x: Probe, inputs: InputNames = None) -> Probe:
    """Returns a probe that can be read several times: a one-shot iterator becomes a list.

    After the first reading nothing would be left of an iterator for the second.

    Raises:
        ValueError: for something that is not a probe.
    """
    if isinstance(x, Tensor | Mapping) or _are_inputs(x, inputs):
        return x
    # as (x,), so that two batches of an iterator are not taken for a batch [x, y] later
    return [(batch,) if isinstance(batch, Tensor) else batch for batch in iterable(x)]


def has_labels(x: Probe, inputs: InputNames = None) -> bool | None:
    """Tells whether a probe brings labels along; None where only reading its batches tells."""
    if isinstance(x, Tensor):
        return False
    if isinstance(x, Mapping):
        return _label_key(x, inputs) is not None
    if isinstance(x, tuple) and _are_inputs(x, inputs):
        return len(x) > _count(inputs)
    return None


def extent(
    x: Any, batch_size: int | None = None, inputs: InputNames = None
) -> tuple[int | None, int | None]:
    """Returns how many batches and examples a probe has; None where only reading it tells.

    >>> extent(torch.ones(5, 2), 2), extent([torch.ones(5, 2)]), extent(iter([torch.ones(5, 2)]))
    ((3, 5), (1, None), (None, None))
    """
    if isinstance(x, Tensor | Mapping) or _are_inputs(x, inputs):
        examples = len(x) if isinstance(x, Tensor) else _examples_in(x)
        return -(-examples // (batch_size or max(examples, 1))), examples
    with suppress(Exception):  # a data set of unknown length raises what it likes
        return (len(x) if batch_size is None else None), None
    return None, None


def _examples_in(x: Mapping | tuple) -> int:
    parts = x.values() if isinstance(x, Mapping) else x
    return next((len(t) for t in parts if isinstance(t, Tensor) and t.dim()), 0)


def batches(
    model: nn.Module,
    x: Probe,
    y: Any = None,
    batch_size: int | None = None,
    *,
    inputs: InputNames = None,
    mask: Any = None,
) -> Iterator[Batch]:
    """Yields batches of inputs, labels and masks on the model's device, in order.

    Labels that are not a tensor, as a list or an array, become one where they hold one label per
    example. Others, as the boxes of a detection data set, are passed on as they are: whoever reads
    labels refuses them.

    Args:
        x: a tensor of examples, a dict of the model's arguments, or an iterable of batches x, (x,),
            (x, y) or dicts. The labels of a dict are under "labels" or "label".
        y: the labels of a probe that is one tensor, one dict or one tuple of inputs.
        batch_size: examples per batch; by default all of a tensor, and batches as they come.
        inputs: how many parts of a batch ``(x1, x2, …, y)`` the model is called with. Or the names
            of its arguments: keys of a dict, or names for the parts of a tuple.
        mask: the positions that count: a tensor with the examples in front, or a function of a
            batch's inputs and labels that returns one.

    Raises:
        ValueError: for an empty probe, x and y that do not match, what may be one batch (x, y) or
            several, and examples with NaN or infinity.

    >>> [len(batch.x) for batch in batches(nn.Linear(2, 1), torch.ones(5, 2), batch_size=2)]
    [2, 2, 1]
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for batch in _split(model, x, y, batch_size, inputs, mask):
        _refuse_not_finite(batch.x)
        if len(batch.x):
            empty = False
            b = as_labels(batch.y, len(batch.x))
            yield batch._replace(
                # autograd cannot use an inference tensor
                x=mapped(batch.x, lambda t: (t.clone() if t.is_inference() else t).to(device)),
                y=b.to(device) if isinstance(b, Tensor) else b,
                mask=_mask_of(mask, batch._replace(y=b), device),
            )
    if empty:
        raise ValueError(
            "The probe is empty: give at least one example (an iterator that was read before is "
            "empty)."
        )


def _refuse_not_finite(x: Inputs) -> None:
    if isinstance(x, Tensor):
        bad = x.is_floating_point() and not x.isfinite().all()
    else:  # a mask among the arguments may hold −∞
        bad = any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors(x))
    if bad:
        raise ValueError("The probe must be finite: x holds NaN or infinity.")


def _mask_of(mask: Any, batch: Batch, device: torch.device) -> Tensor | None:
    """The positions of a batch that count, as bool."""
    if mask is None:
        return None
    chosen = batch.mask
    if not isinstance(mask, Tensor):
        chosen = mask(arguments_as_given(batch.x), batch.y)
    if not isinstance(chosen, Tensor) or chosen.dim() == 0 or len(chosen) != len(batch.x):
        got = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(
            f"'mask' must hold True where a position counts, with {len(batch.x)} examples in "
            f"front, got {got}."
        )
    return chosen.to(device).bool()


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


# -- from what users bring to batches --------------------------------------------------------------


def _split(
    model: nn.Module, x: Probe, y: Any, batch_size: int | None, inputs: InputNames, mask: Any
) -> Iterator[Batch]:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"'batch_size' must be at least 1, got {batch_size}.")
    if isinstance(x, Tensor | Mapping) or _are_inputs(x, inputs):
        whole = _read(model, x, inputs)
        whole = whole if y is None else whole._replace(y=y)
        if isinstance(mask, Tensor):
            whole = whole._replace(mask=mask)
        yield from _pieces(whole, batch_size or max(len(whole.x), 1))
        return
    probe = iterable(x)
    if y is not None:
        raise ValueError("Labels y go with a tensor x: give an iterable as batches (x, y).")
    if isinstance(mask, Tensor):
        raise ValueError(
            "A tensor 'mask' goes with a tensor x. For batches give a function of x and y."
        )
    for parts in probe:
        batch = _read(model, parts, inputs)
        yield from (batch,) if batch_size is None else _pieces(batch, batch_size)


def _pieces(batch: Batch, size: int) -> Iterator[Batch]:
    examples = len(batch.x)
    y = as_labels(batch.y, examples)
    for name, t in (("y", y), ("mask", batch.mask)):
        if isinstance(t, Tensor) and (t.dim() == 0 or len(t) != examples):
            shape = tuple(batch.x.shape) if isinstance(batch.x, Tensor) else f"{examples} examples"
            raise ValueError(
                f"Probe tensors x and {name} must have the same examples, got shapes {shape} and "
                f"{tuple(t.shape)}."
            )
    for i in range(0, examples, size):
        part = slice(i, i + size)
        yield batch._replace(
            x=batch.x[part],
            y=y[part] if isinstance(y, Tensor) else y,
            mask=None if batch.mask is None else batch.mask[part],
        )


def _count(inputs: InputNames) -> int:
    """How many parts of a tuple are the model's inputs."""
    return 1 if inputs is None else inputs if isinstance(inputs, int) else len(inputs)


def _are_inputs(x: Any, inputs: InputNames) -> bool:
    """Whether a tuple holds the inputs of one batch, and perhaps its labels, as ``inputs`` says."""
    count = _count(inputs)
    return (
        isinstance(x, tuple)
        and inputs is not None
        and len(x) in (count, count + 1)
        and all(isinstance(part, Tensor) for part in x[:count])
    )


def _read(model: nn.Module, parts: Any, inputs: InputNames) -> Batch:
    """One batch as it comes from a data loader: x, (x,), (x, y), (x1, x2, y), or a dict.

    What follows y is not used.
    """
    if isinstance(parts, Tensor):
        return Batch(parts)
    if isinstance(parts, Mapping):
        return _read_dict(model, parts, inputs)
    if not isinstance(parts, tuple | list):
        kind = type(parts).__name__
        raise ValueError(f"A batch must be a tensor x, a pair (x, y) or a dict, got {kind}.")
    if not parts:
        raise ValueError("A batch must be a tensor x or a pair (x, y), got an empty one.")
    first, count = parts[0], _count(inputs)
    y = parts[count] if len(parts) > count else None
    if isinstance(first, Mapping):
        batch = _read_dict(model, first, inputs)
        return batch if len(parts) < 2 else batch._replace(y=parts[1], y_in_call=False)
    if isinstance(first, tuple) and first and isinstance(first[0], Tensor):
        return Batch(Examples(tuple(first)), parts[1] if len(parts) > 1 else None)
    if isinstance(first, Examples):
        return Batch(first, y)
    if not isinstance(first, Tensor):
        kind = type(first).__name__
        raise ValueError(f"A batch must be a tensor x, a pair (x, y) or a dict, got {kind}.")
    if len(parts) < count:
        raise ValueError(f"A batch must have the {count} parts of inputs=, got {len(parts)}.")
    if isinstance(inputs, Sequence):
        return Batch(Examples((), dict(zip(inputs, parts, strict=False))), y)
    return Batch(first if count == 1 else Examples(tuple(parts[:count])), y)


def _read_dict(model: nn.Module, parts: Mapping, inputs: InputNames) -> Batch:
    key = _label_key(parts, inputs)
    if inputs is None or isinstance(inputs, int):
        names = [name for name in parts if name != key]
    else:
        names = [inputs] if isinstance(inputs, str) else list(inputs)
        missing = [name for name in names if name not in parts]
        if missing:
            raise ValueError(
                f"A batch must hold {', '.join(map(repr, missing))} of inputs=, got "
                f"{', '.join(map(repr, parts))}."
            )
    kwargs = {name: parts[name] for name in names}
    in_call = key is not None and inputs is None and _takes(model, key)
    if in_call:  # the loss that comes back tells how the model reads them
        kwargs[key] = parts[key]
    x = Examples((), kwargs)
    if not len(x):
        raise ValueError(
            f"A dict batch must hold tensors with examples, got {', '.join(map(repr, parts))}."
        )
    return Batch(x, None if key is None else parts[key], y_in_call=in_call)


def _label_key(parts: Mapping, inputs: InputNames) -> str | None:
    names = inputs if isinstance(inputs, Sequence) else ()
    return next((key for key in LABEL_KEYS if key in parts and key not in names), None)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name, or takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
