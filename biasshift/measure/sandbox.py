"""Measurements leave the model and the process as they found them, also after an exception."""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.precision import full_precision

# Warnings about what is intended here: operations without a batching rule are looped over, and
# nothing trains through a checkpoint.
INTENDED = (
    "There is a performance drop because we have not yet implemented the batching rule",
    "None of the inputs have requires_grad=True",
)


@contextmanager
def undisturbed(
    model: nn.Module, *, evaluate: bool = False, gradients: bool = False
) -> Iterator[None]:
    """Restores the model and the process after the block.

    Of the model these are modes, requires_grad, buffers and hooks; of the process the random state
    and the precision flags.

    Args:
        evaluate: switch to eval mode inside the block.
        gradients: have every parameter require gradients inside the block, so that every layer is
            on the graph.
    """
    devices = {p.device for p in model.parameters()}
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(full_precision({device.type for device in devices}))
        # Compiled parts run uncompiled: hooks added after compilation would never fire. Nothing is
        # compiled before dynamo was imported.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        for message in INTENDED:
            warnings.filterwarnings("ignore", message=message)
        stack.enter_context(_same_buffers(model))
        stack.enter_context(_same_modes(model))
        if gradients:
            stack.enter_context(_all_on_the_graph(model))
        if evaluate:
            model.eval()
        yield


def forward(model: nn.Module, x: Tensor, restart: Callable[[], object] = lambda: None) -> Any:
    """Returns what the model returns for a copy of the examples, which it may write into.

    A model that differentiates inside its forward pass cannot run without gradients. It is run
    again with them.

    Args:
        restart: called before the model runs again, to forget what hooks have recorded so far.
    """
    try:
        return model(x.clone())
    except RuntimeError as error:
        if torch.is_grad_enabled() or "grad" not in str(error):
            raise
    restart()
    with torch.enable_grad():
        return model(x.clone())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches a model to eval mode inside the block, and restores the mode of every module.

    Nothing else is restored: running statistics do not move in eval mode. It costs less than
    `undisturbed`.
    """
    with _same_modes(model):
        model.eval()
        yield


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    # Module by module: somebody may keep a part in eval mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics, a count of calls, a cache: changed in place, or new tensors."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.layout == torch.strided and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _all_on_the_graph(model: nn.Module) -> Iterator[None]:
    """Frozen parameters require gradients too.

    The user's own backward hooks rest: they may change gradients, and are no part of F.
    """
    frozen = [
        p
        for p in model.parameters()
        if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    ]
    hooks = [
        (module, module._backward_hooks, module._backward_pre_hooks)
        for module in model.modules()
        if module._backward_hooks or module._backward_pre_hooks
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
