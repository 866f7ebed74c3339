"""A GPU inside a ``with`` block: PyTorch finds one, and "cuda" gives tensors of `gpu_tensors`.

It needs a process of its own, since it registers a device for good.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from gpu_tensors import (
    GENERATORS,
    STATE,
    WAITS,
    Generator,
    GpuTensor,
    on_gpu,
    run,
    seed_gpu,
    wait,
)
from torch import Tensor, nn
from torch.optim import optimizer as optimizers
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode

from biasshift.measure import layer_types

MEMORY = 100 << 30
CUDA: dict[str, Callable] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_rng_state": lambda device=0: STATE["random"].clone(),
    "set_rng_state": lambda state, device=0: STATE.update(random=state.clone()),
    "manual_seed": seed_gpu,
    "manual_seed_all": seed_gpu,
    "mem_get_info": lambda device=0: (MEMORY, MEMORY),
    "memory_reserved": lambda device=0: 0,
    "memory_allocated": lambda device=0: 0,
    "synchronize": lambda *_: wait("synchronize"),
    "set_device": lambda device: None,
    "get_device_name": lambda *_: "none",
    "get_device_capability": lambda *_: (9, 0),
}


class Operations(TorchDispatchMode):
    """Carries out operations that make tensors on the GPU without having one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Notes the generators that calls are given, with the device that they say they are on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (given := kwargs.get("generator")) is None:
            return func(*args, **kwargs)
        GENERATORS.append(given)
        try:
            return func(*args, **kwargs)
        finally:
            GENERATORS.pop()


def _tensor(original: Callable) -> Callable:
    @functools.wraps(original)
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or not on_gpu(device):
            return original(data, *args, device=device, **kwargs)
        wait("torch.tensor on the device")
        return GpuTensor(original(data, *args, **kwargs))

    return make


def _to(original: Callable) -> Callable:
    def here(x: Any) -> Any:  # "cuda" without a number would ask the driver
        named = isinstance(x, str | torch.device) and on_gpu(x)
        return torch.device("fakegpu", 0) if named else x

    @functools.wraps(original)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, *map(here, args), **{k: here(v) for k, v in kwargs.items()})

    return to


@contextmanager
def simulated_gpu() -> Iterator[Counter[str]]:
    """Yields why and where the host has waited for the GPU, which the block may clear."""
    with ExitStack() as stack:

        def patch(place: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(place, name, value))

        for name, value in CUDA.items():
            patch(torch.cuda, name, value)
        patch(torch, "Generator", Generator)
        patch(torch, "tensor", _tensor(torch.tensor))
        patch(Tensor, "to", _to(Tensor.to))
        patch(Tensor, "cuda", lambda self, *_: self.to("cuda"))
        # To the package these are no tensors of another kind, which it refuses.
        plain = mock.patch.object(layer_types, "_is_of_another_kind", lambda p: False, create=True)
        stack.enter_context(plain)
        for module in (optimizers, foreach):
            if hasattr(module, "_foreach_supported_types"):
                patch(module, "_foreach_supported_types", [Tensor, nn.Parameter, GpuTensor])
        stack.enter_context(Calls())
        stack.enter_context(Operations())
        WAITS.clear()
        yield WAITS
