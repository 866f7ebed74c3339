"""Composite modules, taken apart: attention and recurrent networks as the linear layers in them.

PyTorch runs them as one function. After `take_apart` their forward calls its `parts` as modules,
so that hooks see what goes into every layer, and returns the same up to rounding. PyTorch's fused
transformer layers, which call no module at all, are off meanwhile.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from biasshift.measure import attention, recurrence
from biasshift.measure.parts import LinearPart
from biasshift.restoration import Restoration

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

_parts: dict[nn.Module, Parts] = {}  # of the modules that are taken apart
_dispatching_kinds: set[type[nn.Module]] = set()
_at_rest: set[nn.Module] = set()  # layers that PyTorch never calls, without the user's hooks


def take_apart(restoration: Restoration, model: nn.Module, apart: bool = True) -> None:
    """Has the composite modules of a model call their parts until the restoration.

    Other models that run at the same time are left alone.

    Args:
        apart: turn off PyTorch's fused transformer layers only, if False.
    """
    composites = [m for m in model.modules() if isinstance(m, COMPOSITES)]
    if not composites:
        return
    modules = {m: of_module for m in composites if apart and (of_module := parts(m))}
    mha, undo = torch.backends.mha, restoration.undo
    undo(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
    mha.set_fastpath_enabled(False)
    for kind, (_, run) in KINDS.items():
        if kind not in _dispatching_kinds:
            undo(_dispatching_kinds.discard, kind)
            undo(setattr, kind, "forward", kind.forward)
            kind.forward = _dispatching(kind.forward, run)
            _dispatching_kinds.add(kind)
    for module, of_module in modules.items():
        if module not in _parts:
            undo(_parts.pop, module, None)
            _parts[module] = of_module
        output = module._modules.get("out_proj")
        if output is not None and output not in _at_rest:
            # PyTorch reads the weights of this layer and does not call it: hooks never run.
            undo(_at_rest.discard, output)
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                undo(setattr, output, name, getattr(output, name))
                setattr(output, name, OrderedDict())
            _at_rest.add(output)


def _dispatching(original: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self in _parts:
            return run(original, _parts[self], self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
