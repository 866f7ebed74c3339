"""Measurements leave the model and the process as they found them, also after an exception."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from biasshift.measure.composites import take_apart
from biasshift.measure.examples import Inputs, call
from biasshift.measure.module_hooks import HOOKS
from biasshift.measure.process_state import (
    ignore_intended_warnings,
    leave_transforms,
    run_uncompiled,
)
from biasshift.measure.random_state import RandomState, note_forward
from biasshift.precision import full_precision, set_full_precision
from biasshift.restoration import Restoration, restoring

# Values of these types cannot change in place.
CONSTANT = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device}
MADE_OF = ("_orig", "_g")  # ends of parameters' names: "weight_orig" of the attribute "weight"
OWN = frozenset(vars(nn.Module()))  # attributes that every module has


@restoring()
def undisturbed(
    restoration: Restoration,
    model: nn.Module,
    *,
    evaluate: bool = False,
    gradients: bool = False,
    apart: bool = True,
) -> None:
    """Restores the model and the process after the block, which one thread at a time may be in.

    Of the model these are modes, requires_grad, buffers, hooks and plain attributes: tensors,
    numbers, lists, dicts and the like, such as a hidden state, a cache or a count of steps. Of the
    process these are the random state and the precision flags. What a forward pass changes inside
    objects of other classes, or in attributes of classes, stays changed.

    Args:
        evaluate: switch to eval mode inside the block.
        gradients: have every parameter require gradients inside the block, so that every layer is
            on the graph.
        apart: have composite modules call the linear layers inside of them inside the block, see
            `composites.take_apart`.
    """
    devices = {p.device for p in model.parameters()}
    undo = restoration.undo
    random_state = RandomState(devices)
    random_state.keep(restoration)
    if torch.is_inference_mode_enabled():
        guard = torch._C._InferenceMode(False)
        undo(guard.__exit__, None, None, None)
        guard.__enter__()
    undo(torch._C._set_grad_enabled, torch.is_grad_enabled())
    torch._C._set_grad_enabled(gradients)
    set_full_precision(restoration, {device.type for device in devices})
    # A copy of a weight that autocast keeps would hide how often the weight is used.
    undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)
    run_uncompiled(restoration)
    ignore_intended_warnings(restoration)
    _keep_attributes(restoration, model)
    _keep_buffers(restoration, model)
    _keep_modes(restoration, model)
    take_apart(restoration, model, apart)
    if gradients:
        _put_all_on_the_graph(restoration, model)
    if evaluate:
        model.eval()
    random_state.ask(restoration)
    leave_transforms(restoration)


def forward(model: nn.Module, x: Inputs, restart: Callable[[], object] = lambda: None) -> Any:
    """Returns what the model returns for a copy of the examples, which it may write into.

    A model that differentiates inside its forward pass cannot run without gradients. It is run
    again with them. Precision flags that it leaves set do not outlast its forward pass.

    Args:
        restart: called before the model runs again, to forget what hooks have recorded so far.
    """
    note_forward(model, x)
    with full_precision({x.device.type}):
        try:
            return call(model, x.clone())
        except RuntimeError as error:
            if torch.is_grad_enabled() or "grad" not in str(error):
                raise
        restart()
        with torch.enable_grad():
            return call(model, x.clone())


@restoring("never")
def evaluation_mode(restoration: Restoration, model: nn.Module) -> None:
    """Switches a model to eval mode inside the block, and restores the mode of every module.

    Nothing else is restored: running statistics do not move in eval mode. It costs less than
    `undisturbed`, and other threads do not wait.
    """
    _keep_modes(restoration, model)
    model.eval()


# -- the model -------------------------------------------------------------------------------------


def _keep_modes(restoration: Restoration, model: nn.Module) -> None:
    # Module by module: somebody may keep a part in eval mode while the rest trains.
    restoration.undo(_restore_modes, [(module, module.training) for module in model.modules()])


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _keep_buffers(restoration: Restoration, model: nn.Module) -> None:
    """Running statistics, a count of calls, a cache: changed in place, or new tensors."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.layout == torch.strided and not buffer.is_inference()
    ]
    restoration.undo(_restore_buffers, buffers)


def _restore_buffers(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, value in buffers:
        module._buffers[name] = buffer
        if not torch.equal(buffer, value):
            buffer.detach().copy_(value)


def _keep_attributes(restoration: Restoration, model: nn.Module) -> None:
    """Hidden states, caches and counts: assigned anew, or changed in place.

    Modules, parameters, buffers and hooks that a forward pass adds go too.
    """
    # Lazy modules become others in their first forward pass, for good.
    modules = [
        module
        for module in model.modules()
        if not any(isinstance(p, UninitializedParameter) for p in module._parameters.values())
    ]
    attributes = [(vars(module), module._parameters, dict(vars(module))) for module in modules]
    members = [
        (names, dict(names))
        for module in modules
        for names in (
            module._parameters,
            module._buffers,
            module._modules,
            *(vars(module)[name] for name in HOOKS),
        )
    ]
    contents: dict[int, tuple[object, Callable[[], object]]] = {}
    for _, _, before in attributes:
        for name, value in before.items():
            if type(value) not in CONSTANT and name not in OWN:
                _add_contents(value, contents)
    restoration.undo(_restore_attributes, attributes, members, contents)


def _restore_attributes(
    attributes: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]],
    members: list[tuple[dict, dict]],
    contents: dict[int, tuple[object, Callable[[], object]]],
) -> None:
    for names, parameters, before in attributes:
        # Hooks of older weight_norm, spectral_norm and pruning make these before every call.
        made = (key.rpartition("_")[0] for key in parameters if key.endswith(MADE_OF))
        _restore_dict(names, before | {name: names[name] for name in made if name in names})
    for names, before in members:
        _restore_dict(names, before)
    for _, restore in contents.values():
        restore()


def _add_contents(value: Any, restored: dict[int, tuple[object, Callable[[], object]]]) -> None:
    """Adds everything in a value that can change in place, and a function that changes it back."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        kind, restore = type(value), None
        parts: Iterable = ()
        if kind in CONSTANT or id(value) in restored:
            continue
        if kind is Tensor and value.layout == torch.strided:
            if not (value.is_inference() or value.is_meta):
                restore = partial(_restore_tensor, value, value.detach().clone())
        elif kind is np.ndarray:
            restore = partial(_restore_array, value, value.copy())
        elif kind is torch.Generator:
            restore = partial(value.set_state, value.get_state())
        elif kind is np.random.Generator:
            restore = partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif kind is random.Random:
            restore = partial(value.setstate, value.getstate())
        elif kind in (dict, OrderedDict, defaultdict, Counter):
            restore, parts = partial(_restore_dict, value, dict(value)), value.values()
        elif kind in (list, deque):
            restore, parts = partial(_restore_list, value, list(value)), value
        elif kind is set:
            restore = partial(_restore_set, value, set(value))
        elif isinstance(value, tuple):
            parts = value
        elif kind is SimpleNamespace or (is_dataclass(kind) and hasattr(value, "__dict__")):
            parts = (vars(value),)
        if restore is not None:
            restored[id(value)] = value, restore
        waiting += parts


def _restore_tensor(value: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        if value.shape != before.shape:
            value.data = before
        elif not torch.equal(value, before):
            # NaN differs from itself, and a copy would invalidate graphs that hold the tensor.
            changed = (value != before) & ~((value != value) & (before != before))
            if changed.any():
                value.copy_(before)


def _restore_array(value: np.ndarray, before: np.ndarray) -> None:
    if value.tobytes() != before.tobytes():
        value[...] = before


def _restore_dict(value: dict, before: dict) -> None:
    same_names = list(value) == list(before)
    if not (same_names and all(map(is_, value.values(), before.values()))):
        value.clear()
        value.update(before)


def _restore_list(value: list | deque, before: list) -> None:
    if len(value) != len(before) or not all(map(is_, value, before)):
        value.clear()
        value.extend(before)


def _restore_set(value: set, before: set) -> None:
    if value != before:
        value.clear()
        value.update(before)


def _put_all_on_the_graph(restoration: Restoration, model: nn.Module) -> None:
    """Frozen parameters require gradients too.

    The user's own backward hooks rest: they may change gradients, and are no part of F.
    """
    for p in list(model.parameters()):
        if not p.requires_grad and (p.is_floating_point() or p.is_complex()):
            restoration.undo(p.requires_grad_, False)
            p.requires_grad_(True)
    for module in list(model.modules()):
        for name in ("_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, name):
                restoration.undo(setattr, module, name, getattr(module, name))
                setattr(module, name, OrderedDict())
