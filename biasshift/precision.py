"""The precision of matrix products, set for the length of a block and restored at its end.

PyTorch may round the factors of float32 products: to bfloat16 or float16 under autocast, to TF32 by
flags of the process. Measurements want neither, and a run wants what its configuration says.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]


@contextmanager
def full_precision(devices: Iterable[str]) -> Iterator[None]:
    """Turns autocast and TF32 off: products in bfloat16 put the Fisher blocks 4e-3 off.

    Flags are read and set operation by operation, since the older, global ones raise where a user
    has set one of these.

    Args:
        devices: the device types that autocast may be on for, such as "cuda"; the CPU is included.
    """
    backends: Any = torch.backends  # pyright knows few of its flags
    flags = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]
    with ExitStack() as restored:
        for device in {*devices, "cpu"}:
            restored.enter_context(torch.autocast(device, enabled=False))
        for flag in flags:
            restored.callback(setattr, flag, "fp32_precision", flag.fp32_precision)
            flag.fp32_precision = "ieee"
        yield


@contextmanager
def product_precision(precision: Precision) -> Iterator[None]:
    """Allows TF32 in products of float32 for "tf32" only, whatever the process is set to.

    For every other precision the factors are not rounded; autocast is the caller's. All flags are
    restored at the end.

    Flags come in two generations. The older, global ones are set, because ``torch.compile`` reads
    those, which raises where the newer, of single operations, say something else. One that raises
    at the beginning is restored through the newer alone.
    """
    backends: Any = torch.backends  # pyright knows few of its flags
    older = (backends.cuda.matmul, backends.cudnn)
    newer = (
        backends,
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
    )
    with ExitStack() as restored:  # from the last to the first: each sets more than those after it
        for flag in newer:
            restored.callback(setattr, flag, "fp32_precision", flag.fp32_precision)
        with suppress(RuntimeError):
            restored.callback(
                torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
            )
        for flag in older:
            with suppress(RuntimeError):
                restored.callback(setattr, flag, "allow_tf32", flag.allow_tf32)
        # As PyTorch begins.
        backends.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"
        for flag in older:
            flag.allow_tf32 = precision == "tf32"
        yield
