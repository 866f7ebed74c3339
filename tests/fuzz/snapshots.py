"""What a measurement must leave as it was: the model, the probe, and the process."""

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, tuple, set)


def state(model: nn.Module, *tensors: Tensor) -> dict[str, Any]:
    """Everything that can be read of a model, its gradients, hooks and attributes."""
    _, words, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "random state of torch": torch.get_rng_state().numpy().tobytes(),
        # beartype, which checks shapes under pytest, draws from it
        "random state of Python": "beartype" in sys.modules or random.getstate(),
        "random state of NumPy": (words.tobytes(), *rest),
        "gradient mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "precision": (
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_inference_mode_enabled(),
        ),
        "probe": [frozen(t) for t in tensors],
    }
    for name, module in model.named_modules():
        found[f"type of {name!r}"] = type(module)
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = frozen(value)
    for name, p in model.named_parameters():
        found[f"gradient of {name}"] = None if p.grad is None else (id(p.grad), frozen(p.grad))
    return found


def frozen(value: Any) -> Any:
    """A value that can be compared later; others are known by what they are."""
    if isinstance(value, Tensor):
        data = value.detach()
        content = data.cpu().numpy().tobytes()
        return id(value), value.requires_grad, tuple(data.shape), data.dtype, content
    if isinstance(value, dict):
        return [(frozen(k), frozen(v)) for k, v in value.items()]
    if isinstance(value, CONTAINERS):
        return type(value).__name__, [frozen(v) for v in value]
    if isinstance(value, bool | int | float | str | type(None)):
        return repr(value)
    return id(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what has changed."""
    return [k for k in before | after if before.get(k, "absent") != after.get(k, "absent")]
