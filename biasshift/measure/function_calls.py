"""Linear layers whose weights a function applies, in place of a call of the module."""

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import GeneratorType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

from biasshift.measure.module_hooks import add_hook
from biasshift.restoration import Restoration

# (name, module, input, output) → another output to go on with, or None
Hook = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


def watch_function_calls(
    restoration: Restoration,
    modules: Mapping[str, nn.Module],
    hook: Hook,
    copy_inputs: bool = False,
) -> None:
    """Calls the hook for every ``F.linear`` with the weight and bias of a layer, until restored.

    Attention of torchvision's Swin transformers, for example, hands the weights of its layers to a
    function. Calls inside of a layer's own forward are the module's, and have hooks of their own.

    Args:
        copy_inputs: let the function read a copy, so that later writes into its input are harmless.
    """
    layers = {
        id(module._parameters["weight"]): (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is not None
    }
    running: Counter[str] = Counter()
    for name, module in layers.values():
        add_hook(restoration, module, partial(_count, running, name, 1), before=True)
        leave = partial(_count, running, name, -1)
        add_hook(restoration, module, leave, prepend=True, always_call=True)
    mode = _FunctionCalls(layers, running, hook, copy_inputs)
    restoration.undo(_leave, mode)
    mode.__enter__()


def _leave(mode: TorchFunctionMode) -> None:
    """Leaves a mode, and those inside of it that an exception has left behind."""
    if mode not in _get_current_function_mode_stack():
        # PyTorch takes it off the stack for the length of a call, in a generator that puts it back.
        # An interruption has left that behind, and it would do so when its traceback is freed.
        for holder in gc.get_referrers(mode):
            if isinstance(holder, GeneratorType):
                with suppress(ValueError):  # one that runs
                    holder.close()
    while mode in _get_current_function_mode_stack():
        _pop_mode()


def _count(running: Counter[str], name: str, step: int, *_: object) -> None:
    running[name] += step


class _FunctionCalls(TorchFunctionMode):
    def __init__(
        self,
        layers: Mapping[int, tuple[str, nn.Module]],
        running: Counter[str],
        hook: Hook,
        copy_inputs: bool,
    ) -> None:
        super().__init__()
        self.layers, self.running, self.hook, self.copy_inputs = layers, running, hook, copy_inputs

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        names = ("input", "weight", "bias")
        a, weight, bias = (*args, *(kwargs.get(name) for name in names[len(args) :]))
        assert isinstance(a, Tensor)
        name, module = self.layers.get(id(weight), ("", None))
        if module is None or self.running[name] > 0 or bias is not module._parameters.get("bias"):
            return func(*args, **kwargs)
        a = a.clone() if self.copy_inputs else a
        output = func(a, weight, bias)
        replaced = self.hook(name, module, a, output)
        return output if replaced is None else replaced
