"""Measurements leave the model and the process as they were found."""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from biasshift.precision import full_precision


@contextmanager
def undisturbed(
    model: nn.Module, *, evaluate: bool = False, gradients: bool = False
) -> Iterator[None]:
    """Leaves the model and the process as found: modes, requires_grad, buffers, hooks, random
    state, precision flags.

    Args:
        evaluate: switch to eval mode inside the block.
        gradients: have every parameter require gradients inside the block, so that every layer is
            on the graph.
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
    """A model may keep running statistics, a count of its calls, or a cache: in place, or as a new
    tensor under the old name.
    """
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
    """Frozen parameters require gradients too. The user's own backward hooks rest: they may change
    gradients, and are no part of F.
    """
    frozen = [
        p
        for p in model.parameters()
        if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    ]
    hooks = [
        (m, m._backward_hooks, m._backward_pre_hooks)
        for m in model.modules()
        if m._backward_hooks or m._backward_pre_hooks
    ]
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
    """Compiled parts run uncompiled: hooks added after compilation would never fire. Nothing is
    compiled before dynamo was imported.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Two warnings say what is right here: operations without a batching rule are looped over, and
    nothing trains through a checkpoint.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="There is a performance drop because we have not yet implemented the batching "
            "rule",
        )
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module's mode is left as found."""
    # Module by module: somebody may keep a part in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
