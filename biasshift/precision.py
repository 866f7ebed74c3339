"""The precision of matrix products, set for the length of a block and restored at its end.

PyTorch may round the factors of float32 products: to bfloat16 or float16 under autocast, to TF32 by
flags of the process. Measurements want neither, and a run wants what its configuration says.

The flags come in two generations, the older for the whole process and the newer for single
operations. PyTorch raises when the older are read while the newer say something else. So both are
set here, such that they agree, and whatever model or user reads or sets works.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from biasshift.restoration import Restoration, restoring

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

# Where PyTorch keeps the newer flags: backend and operation. "none" leaves a flag to the one of
# "all", and that to "generic". Those that others are left to stand first.
FLAGS = (
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, name) for backend in ("cuda", "mkldnn") for name in ("matmul", "conv", "rnn")),
)
_read, _write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


def set_full_precision(restoration: Restoration, devices: Iterable[str]) -> None:
    """Turns autocast and TF32 off until the restoration: products in bfloat16 put F 4e-3 off.

    All flags are restored, whatever is set in between.

    Args:
        devices: the device types that autocast may be on for, such as "cuda"; the CPU is included.
    """
    for device in {*devices, "cpu"}:
        restoration.undo(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)
    _leave_flags_to_others(restoration)
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(False)
    for flag in FLAGS:
        _write(*flag, "ieee")


full_precision = restoring()(set_full_precision)


@restoring("ends")
def product_precision(restoration: Restoration, precision: Precision) -> None:
    """Allows TF32 in products of float32 for "tf32" only, whatever the process is set to.

    For every other precision the factors are not rounded; autocast is the caller's. All flags are
    restored at the end.
    """
    _leave_flags_to_others(restoration)
    # The older flags, because torch.compile reads those; the others stay as PyTorch begins.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch._C._set_cudnn_allow_tf32(precision == "tf32")


def _leave_flags_to_others(restoration: Restoration) -> None:
    """Leaves every flag to the others until the restoration of all of them."""
    # Restored from the last to the first: an older flag also sets newer ones.
    for flag in FLAGS:
        # What those above it say would be read in place of "none", were they not "none" too.
        restoration.undo(_write, *flag, _read(*flag))
        _write(*flag, "none")
    restoration.undo(torch._C._set_cudnn_allow_tf32, _older_cudnn_flag())
    older = torch.get_float32_matmul_precision()
    restoration.undo(torch.set_float32_matmul_precision, older)


def _older_cudnn_flag() -> bool:
    """Whether the older flag allows TF32 in cuDNN; PyTorch only says so where the newer agree."""
    for name in ("conv", "rnn"):
        _write("cuda", name, "tf32")
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return False
