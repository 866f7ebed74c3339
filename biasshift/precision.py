"""Matrix products in the precision of their factors, whatever the process is set to."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision(devices: Iterable[str]) -> Iterator[None]:
    """No autocast, no TF32: bf16 products put the Fisher blocks 4e-3 off.

    Flags are read and set operation by operation: the older, global ones raise where a user has set one of these.
    """
    backends = (
        (torch.backends.cuda, ("matmul",)),
        (torch.backends.cudnn, ("conv", "rnn")),
        (torch.backends.mkldnn, ("matmul", "conv", "rnn")),
    )
    flags = [getattr(backend, operation) for backend, operations in backends for operation in operations]
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
