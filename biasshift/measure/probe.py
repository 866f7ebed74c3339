"""Looking at a model without disturbing it, and reading probe data in batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.measure import layer_types
from biasshift.measure.hooks import underlying
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.sandbox import undisturbed

Probe = Tensor | Iterable  # a tensor of examples, or batches x or (x, y)
Selection = Iterable[str] | Callable[[str, nn.Module], bool] | None


# -- choosing layers -------------------------------------------------------------------------------


def weight_layers(
    model: nn.Module, select: Selection = None, required: bool = True
) -> dict[str, WeightLayer]:
    """The layers whose units can be measured, by PyTorch's module names.

    Raises:
        ValueError: for an unknown name, or a layer of a kind that is not covered.
    """
    chosen = _selected(model, select)
    for name, module in chosen.items():
        why = layer_types.why_uncovered(module)
        if (
            why is None
            and select is not None
            and not callable(select)
            and not layer_types.is_covered(module)
        ):
            why = "it has no units with weights"
        if why:
            raise ValueError(
                f"Layer '{name}' ({type(module).__name__}) cannot be measured: {why}. Leave it out "
                "with layers=."
            )
    covered = {name: module for name, module in chosen.items() if layer_types.is_covered(module)}
    if not covered and required:
        raise ValueError(
            "The model has no layer that can be measured: nn.Linear, nn.Conv1d/2d/3d or "
            "nn.ConvTranspose1d/2d/3d, called as modules."
        )
    return covered


def _selected(model: nn.Module, select: Selection) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if select is None:
        return named
    if callable(select):
        return {name: module for name, module in named.items() if select(name, module)}
    names = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in names if name not in named]
    if unknown:
        first = {module: name for name, module in named.items()}
        again = [
            f"'{name}' is '{first[m]}'"
            for name, m in model.named_modules(remove_duplicate=False)
            if name in unknown
        ]
        known = ", ".join(
            f"'{name}'" for name, module in named.items() if layer_types.is_covered(module)
        )
        hint = f" ({'; '.join(again)} under another name)" if again else ""
        raise ValueError(
            f"The model has no layer {', '.join(map(repr, unknown))}{hint}. Its measurable layers "
            f"are {known}."
        )
    return {name: named[name] for name in names}


# -- reading the probe -----------------------------------------------------------------------------


def iterable(x: Any) -> Iterable:
    """Batches that can be iterated over.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(x, Iterable):
        raise ValueError(
            "The probe must be a tensor of examples, or an iterable of batches x or (x, y), got "
            f"{type(x).__name__}."
        )
    return x


def rereadable(x: Probe) -> Tensor | list:
    """A probe for several looks: of a one-shot iterator nothing would be left for the second.

    Raises:
        ValueError: it is no probe.
    """
    return x if isinstance(x, Tensor) else list(iterable(x))


def batches(
    model: nn.Module, x: Probe, y: Tensor | None = None, batch_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches ``(x, y or None)`` on the model's device, in order.

    Raises:
        ValueError: when there is nothing to read, x and y do not match, or an example holds NaN or
            infinity.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for a, b in _split(x, y, batch_size):
        if not isinstance(a, Tensor):
            raise ValueError(
                f"A batch must be a tensor x or a pair (x, y), got {type(a).__name__}."
            )
        if a.is_floating_point() and not a.isfinite().all():
            raise ValueError("The probe must be finite: x holds NaN or infinity.")
        empty = empty and len(a) == 0
        if len(a):
            a = (
                a.clone() if a.is_inference() else a
            )  # made inside torch.inference_mode, where autograd cannot use it
            yield a.to(device), None if b is None else b.to(device)
    if empty:
        raise ValueError(
            "The probe is empty: give at least one example (an iterator that was read before is "
            "empty)."
        )


def _pair(batch: object) -> tuple[Any, Tensor | None]:
    """A batch is x, (x,) as data loaders give it, or (x, y); anything behind y is not ours."""
    if not isinstance(batch, tuple | list):
        return batch, None
    if not batch:
        raise ValueError("A batch must be a tensor x or a pair (x, y), got an empty one.")
    return batch[0], batch[1] if len(batch) > 1 else None


def _split(
    x: Probe, y: Tensor | None, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if isinstance(x, Tensor):
        if y is not None and len(y) != len(x):
            raise ValueError(f"x and y must have the same examples, got {len(x)} and {len(y)}.")
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
        raise ValueError("y goes with a tensor x; give an iterable as batches (x, y).")
    for batch in iterable(x):
        a, b = _pair(batch)
        if batch_size is None:
            yield a, b
        else:
            yield from _split(a, b, batch_size)


__all__ = [
    "Probe",
    "Selection",
    "batches",
    "iterable",
    "rereadable",
    "underlying",
    "undisturbed",
    "weight_layers",
]
