"""Matrix products in the precision of their factors, whatever the process is set to."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]


@contextmanager
def full_precision(devices: Iterable[str]) -> Iterator[None]:
    """No autocast, no TF32: bf16 products put the Fisher blocks 4e-3 off.

    Flags are read and set operation by operation: the older, global ones raise where a user has set
    one of these.
    """
    backends = (
        (torch.backends.cuda, ("matmul",)),
        (torch.backends.cudnn, ("conv", "rnn")),
        (torch.backends.mkldnn, ("matmul", "conv", "rnn")),
    )
    flags = [
        getattr(backend, operation) for backend, operations in backends for operation in operations
    ]
    found = [flag.fp32_precision for flag in flags]
    with ExitStack() as stack:
        for device in {*devices, "cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for flag in flags:
                flag.fp32_precision = "ieee"
            yield
        finally:
            for flag, precision in zip(flags, found, strict=True):
                flag.fp32_precision = precision


# -- how a GPU rounds the factors of float32 products while a run is trained -------------------


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """To TF32 for "tf32", not at all for the others, whatever the process is set to; its flags are
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
    with ExitStack() as restoring:  # from the last to the first: each sets more than those after it
        for flag in newer:
            restoring.callback(setattr, flag, "fp32_precision", flag.fp32_precision)
        with suppress(RuntimeError):
            restoring.callback(
                torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
            )
        for flag in older:
            with suppress(RuntimeError):
                restoring.callback(setattr, flag, "allow_tf32", flag.allow_tf32)
        backends.fp32_precision = backends.mkldnn.matmul.fp32_precision = (
            "none"  # as PyTorch begins
        )
        for flag in older:
            flag.allow_tf32 = precision == "tf32"
        yield
