"""Looking at a model without disturbing it, and reading probe data in batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biasshift import layers as kinds
from biasshift.layers import WeightLayer
from biasshift.tracing import underlying

Probe = Tensor | Iterable  # a tensor of examples, or batches x or (x, y)
Selection = Iterable[str] | Callable[[str, nn.Module], bool] | None


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = False, gradients: bool = False) -> Iterator[None]:
    """Leaves the model and the process as found: modes, requires_grad, buffers, random state, precision flags.

    Args:
        evaluate: switch to eval mode inside the block.
        gradients: have every parameter require gradients inside the block, so that every layer is on the graph.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if gradients and not p.requires_grad]
    buffers = {b: b.clone() for b in model.buffers()} if any(modes.values()) and not evaluate else {}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(_full_precision(model))
            stack.enter_context(_eager(model))
            stack.enter_context(_quiet_vmap())
            if evaluate:
                model.eval()
            for p in frozen:
                p.requires_grad_(True)
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """No autocast, no TF32: bf16 products put the Fisher blocks 4e-3 off."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    devices = {p.device.type for p in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = cudnn


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Compiled parts run uncompiled: hooks added after compilation would never fire. Asked for only then, as it is slow to import."""
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules())
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Operations without a batching rule are looped over by torch, which is right and says so in a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented the batching rule")
        yield


def refuse_coupled(model: nn.Module) -> None:
    """Raises ValueError where examples of a batch influence each other, or the function is random: no example has its own error."""
    for name, module in model.named_modules():
        why = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            why = "normalizes with the statistics of its batch, which couples the examples"
        elif isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase) and module.training:
            why = "drops units at random" if _drop_rate(module) > 0 else None
        elif isinstance(module, nn.RReLU) and module.training:
            why = "draws random slopes"
        if why:
            hint = "Call model.eval() first" if module.training else "Give it running statistics"
            raise ValueError(f"Layer '{name}' ({type(module).__name__}) {why}: no example has an error of its own. {hint}.")


def _drop_rate(module: nn.Module) -> float:
    return float(getattr(module, "p", None) or getattr(module, "dropout", 0.0))


# -- choosing layers -----------------------------------------------------------------------------------------------------


def weight_layers(model: nn.Module, select: Selection = None, required: bool = True) -> dict[str, WeightLayer]:
    """The layers whose units can be measured, by PyTorch's module names.

    Raises:
        ValueError: for an unknown name, a layer of a kind that is not covered, or parameters tied between two layers.
    """
    named = dict(model.named_modules())
    chosen = _selected(named, select)
    for name, module in chosen.items():
        why = kinds.why_uncovered(module)
        if why is None and select is not None and not callable(select) and not kinds.is_covered(module):
            why = "it has no units with weights"
        if why:
            raise ValueError(f"Layer '{name}' ({type(module).__name__}) cannot be measured: {why}. Leave it out with layers=.")
    covered = {name: module for name, module in chosen.items() if kinds.is_covered(module)}
    if not covered and required:
        raise ValueError("The model has no layer that can be measured: nn.Linear or nn.Conv1d/2d/3d, called as modules.")
    _refuse_ties(covered)
    return covered


def _selected(named: Mapping[str, nn.Module], select: Selection) -> dict[str, nn.Module]:
    if select is None:
        return dict(named)
    if callable(select):
        return {name: module for name, module in named.items() if select(name, module)}
    names = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in names if name not in named]
    if unknown:
        known = ", ".join(f"'{name}'" for name, module in named.items() if kinds.is_covered(module))
        raise ValueError(f"The model has no layer {', '.join(map(repr, unknown))}. Its measurable layers are {known}.")
    return {name: named[name] for name in names}


def _refuse_ties(covered: Mapping[str, WeightLayer]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, module in covered.items():
        for parameter, owned in module.named_parameters():  # behind a parametrization, module.weight is made anew at every look
            first = name if "bias" in parameter else owners.setdefault(owned, name)
            if first != name:
                raise ValueError(
                    f"Layers '{first}' and '{name}' share one weight: neither has a unit Fisher matrix of its own. "
                    "Leave one out with layers=."
                )


# -- reading the probe ---------------------------------------------------------------------------------------------------


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
    for batch in x:
        a, b = _pair(batch)
        if batch_size is None:
            yield a, b
        else:
            yield from _split(a, b, batch_size)


__all__ = ["Probe", "Selection", "batches", "refuse_coupled", "underlying", "undisturbed", "weight_layers"]
