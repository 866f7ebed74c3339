"""Composite modules, taken apart: attention and recurrent networks as the linear layers in them.

PyTorch runs them as one function. Inside `taken_apart` their forward calls its `parts` as modules,
so that hooks see what goes into every layer, and returns the same up to rounding. PyTorch's fused
transformer layers, which call no module at all, are off meanwhile.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from biasshift.measure import attention, recurrence
from biasshift.measure.parts import LinearPart

Parts = dict[str, LinearPart]
KINDS: dict[type[nn.Module], tuple[Callable[..., Parts], Callable[..., Any]]] = {
    nn.MultiheadAttention: (attention.parts, attention.attend),
    nn.LSTM: (recurrence.parts, recurrence.recur),
    nn.GRU: (recurrence.parts, recurrence.recur),
    nn.RNN: (recurrence.parts, recurrence.recur),
    nn.LSTMCell: (recurrence.cell_parts, recurrence.step_cell),
    nn.GRUCell: (recurrence.cell_parts, recurrence.step_cell),
    nn.RNNCell: (recurrence.cell_parts, recurrence.step_cell),
}
COMPOSITES = tuple(KINDS)

_made: WeakKeyDictionary[nn.Module, Parts] = WeakKeyDictionary()


def parts(module: nn.Module) -> Parts:
    """Returns the linear layers inside a composite module that are no modules themselves, by name.

    They are the same objects every time. Modules of other kinds have none.

    >>> list(parts(nn.MultiheadAttention(4, 2)))
    ['q_proj', 'k_proj', 'v_proj']
    >>> list(parts(nn.LSTM(3, 5, bidirectional=True)))
    ['ih_l0', 'hh_l0', 'ih_l0_reverse', 'hh_l0_reverse']
    """
    if not isinstance(module, COMPOSITES) or why_whole(module) is not None:
        return {}
    if module not in _made:
        make = next(make for kind, (make, _) in KINDS.items() if isinstance(module, kind))
        _made[module] = make(module)
    return _made[module]


def layer_names(module: nn.Module) -> list[str]:
    """Returns the names below a composite module that its layers with units have."""
    return [*parts(module), *(name for name, _ in module.named_children())]


def why_whole(module: nn.Module) -> str | None:
    """Returns why a composite module cannot be taken apart, or None.

    Its layers are then no layers to be measured.
    """
    if isinstance(module, nn.MultiheadAttention):
        own = next((name for name in attention.PROJECTIONS if name in module._modules), None)
        if own is not None:
            return f"it has a layer '{own}' of its own, besides PyTorch's projections"
        return attention.why_whole(module)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not isinstance(module, COMPOSITES):
        return f"it is none of {', '.join(f'nn.{kind.__name__}' for kind in COMPOSITES[1:])}"
    return None


# -- in place of PyTorch's forward -----------------------------------------------------------------

_lock = threading.Lock()
_active: Counter[nn.Module] = Counter()  # modules that are taken apart, and how many blocks do so
_parts: dict[nn.Module, Parts] = {}  # of these modules
_originals: dict[type[nn.Module], Callable[..., Any]] = {}
_hooks: dict[nn.Module, tuple[Any, Any]] = {}  # the user's own, of layers that PyTorch never calls
_depth = 0  # blocks at this moment
_fast_path = True


@contextmanager
def taken_apart(model: nn.Module, apart: bool = True) -> Iterator[None]:
    """Has the composite modules of a model call their parts inside the block.

    Other models that run at the same time are left alone.

    Args:
        apart: turn off PyTorch's fused transformer layers only, if False.
    """
    composites = [m for m in model.modules() if isinstance(m, COMPOSITES)]
    if not composites:
        yield
        return
    modules = {m: of_module for m in composites if apart and (of_module := parts(m))}
    with _lock:
        _enter(modules)
    try:
        yield
    finally:
        with _lock:
            _leave(modules)


def _enter(modules: dict[nn.Module, Parts]) -> None:
    global _depth, _fast_path
    _depth += 1
    if _depth == 1:
        _fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for kind, (_, run) in KINDS.items():
            _originals[kind] = kind.forward
            kind.forward = _dispatching(kind.forward, run)
    for module, of_module in modules.items():
        _active[module] += 1
        _parts.setdefault(module, of_module)
        output = module._modules.get("out_proj")
        if output is not None and output not in _hooks:
            # PyTorch reads the weights of this layer and does not call it: hooks never run.
            _hooks[output] = output._forward_hooks, output._forward_pre_hooks
            output._forward_hooks, output._forward_pre_hooks = OrderedDict(), OrderedDict()


def _leave(modules: dict[nn.Module, Parts]) -> None:
    global _depth
    _depth -= 1
    for module in modules:
        _active[module] -= 1
        if not _active[module]:
            del _active[module], _parts[module]
            output = module._modules.get("out_proj")
            if output in _hooks:
                output._forward_hooks, output._forward_pre_hooks = _hooks.pop(output)
    if not _depth:
        torch.backends.mha.set_fastpath_enabled(_fast_path)
        for kind, original in _originals.items():
            kind.forward = original
        _originals.clear()


def _dispatching(original: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self in _parts:
            return run(original, _parts[self], self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
