"""Looking at a model without disturbing it, and reading probe data in batches."""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.measure import layer_types as kinds
from biasshift.measure.hooks import underlying
from biasshift.measure.layer_types import WeightLayer
from biasshift.precision import full_precision

Probe = Tensor | Iterable  # a tensor of examples, or batches x or (x, y)
Selection = Iterable[str] | Callable[[str, nn.Module], bool] | None


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = False, gradients: bool = False) -> Iterator[None]:
    """Leaves the model and the process as found: modes, requires_grad, buffers, hooks, random state, precision flags.

    Args:
        evaluate: switch to eval mode inside the block.
        gradients: have every parameter require gradients inside the block, so that every layer is on the graph.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(full_precision({p.device.type for p in model.parameters()}))
        stack.enter_context(_eager())
        stack.enter_context(_quiet())
        stack.enter_context(_same_buffers(model))
        stack.enter_context(_same_modes(model))
        if gradients:
            stack.enter_context(_all_on_the_graph(model))
        if evaluate:
            model.eval()
        yield


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """A model may keep running statistics, a count of its calls, or a cache: in place, or as a new tensor under the old name."""
    found = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.layout == torch.strided and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in found:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _all_on_the_graph(model: nn.Module) -> Iterator[None]:
    """Frozen parameters require gradients too. The user's own backward hooks rest: they may change gradients, and are no part of F."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    hooks = [(m, m._backward_hooks, m._backward_pre_hooks) for m in model.modules() if m._backward_hooks or m._backward_pre_hooks]
    try:
        for p in frozen:
            p.requires_grad_(True)
        for module, _, _ in hooks:
            module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, after, before in hooks:
            module._backward_hooks, module._backward_pre_hooks = after, before


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run uncompiled: hooks added after compilation would never fire. Nothing is compiled before dynamo was imported."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Two warnings say what is right here: operations without a batching rule are looped over, and nothing trains through a checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented the batching rule")
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


# -- choosing layers -----------------------------------------------------------------------------------------------------


def weight_layers(model: nn.Module, select: Selection = None, required: bool = True) -> dict[str, WeightLayer]:
    """The layers whose units can be measured, by PyTorch's module names.

    Raises:
        ValueError: for an unknown name, or a layer of a kind that is not covered.
    """
    chosen = _selected(model, select)
    for name, module in chosen.items():
        why = kinds.why_uncovered(module)
        if why is None and select is not None and not callable(select) and not kinds.is_covered(module):
            why = "it has no units with weights"
        if why:
            raise ValueError(f"Layer '{name}' ({type(module).__name__}) cannot be measured: {why}. Leave it out with layers=.")
    covered = {name: module for name, module in chosen.items() if kinds.is_covered(module)}
    if not covered and required:
        raise ValueError(
            "The model has no layer that can be measured: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, called as modules."
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
        again = [f"'{name}' is '{first[m]}'" for name, m in model.named_modules(remove_duplicate=False) if name in unknown]
        known = ", ".join(f"'{name}'" for name, module in named.items() if kinds.is_covered(module))
        hint = f" ({'; '.join(again)} under another name)" if again else ""
        raise ValueError(f"The model has no layer {', '.join(map(repr, unknown))}{hint}. Its measurable layers are {known}.")
    return {name: named[name] for name in names}


# -- reading the probe ---------------------------------------------------------------------------------------------------


def iterable(x: Any) -> Iterable:
    """Batches that can be iterated over.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(x, Iterable):
        raise ValueError(f"The probe must be a tensor of examples, or an iterable of batches x or (x, y), got {type(x).__name__}.")
    return x


def rereadable(x: Probe) -> Tensor | list:
    """A probe for several looks: of a one-shot iterator nothing would be left for the second.

    Raises:
        ValueError: it is no probe.
    """
    return x if isinstance(x, Tensor) else list(iterable(x))


def batches(model: nn.Module, x: Probe, y: Tensor | None = None, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches ``(x, y or None)`` on the model's device, in order.

    Raises:
        ValueError: when there is nothing to read, x and y do not match, or an example holds NaN or infinity.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for a, b in _split(x, y, batch_size):
        if not isinstance(a, Tensor):
            raise ValueError(f"A batch must be a tensor x or a pair (x, y), got {type(a).__name__}.")
        if a.is_floating_point() and not a.isfinite().all():
            raise ValueError("The probe must be finite: x holds NaN or infinity.")
        empty = empty and len(a) == 0
        if len(a):
            a = a.clone() if a.is_inference() else a  # made inside torch.inference_mode, where autograd cannot use it
            yield a.to(device), None if b is None else b.to(device)
    if empty:
        raise ValueError("The probe is empty: give at least one example (an iterator that was read before is empty).")


def _pair(batch: object) -> tuple[Any, Tensor | None]:
    """A batch is x, (x,) as data loaders give it, or (x, y); anything behind y is not ours."""
    if not isinstance(batch, tuple | list):
        return batch, None
    if not batch:
        raise ValueError("A batch must be a tensor x or a pair (x, y), got an empty one.")
    return batch[0], batch[1] if len(batch) > 1 else None


def _split(x: Probe, y: Tensor | None, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor | None]]:
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
        raise ValueError("A tuple may be (x, y) or two batches: give x and y as two arguments, or a list of batches.")
    if y is not None:
        raise ValueError("y goes with a tensor x; give an iterable as batches (x, y).")
    for batch in iterable(x):
        a, b = _pair(batch)
        if batch_size is None:
            yield a, b
        else:
            yield from _split(a, b, batch_size)


__all__ = ["Probe", "Selection", "batches", "iterable", "rereadable", "underlying", "undisturbed", "weight_layers"]
