"""What belongs to the process, or to its thread, and is as found after a measurement.

It is what measurements change themselves, and what an interruption inside of PyTorch leaves behind.
Random state and precision have files of their own.
"""

import re
import sys
import threading
import warnings
from typing import Any

import torch
from torch._C._functorch import (
    TransformType,
    _grad_decrement_nesting,
    _jvp_decrement_nesting,
    _vmap_decrement_nesting,
    get_dynamic_layer_stack_depth,
    peek_interpreter_stack,
)

from biasshift.restoration import Restoration

# Warnings about what is intended here: operations without a batching rule are looped over, and
# nothing trains through a checkpoint.
INTENDED = (
    "There is a performance drop because we have not yet implemented the batching rule",
    "None of the inputs have requires_grad=True",
)
LEAVE = {
    TransformType.Grad: _grad_decrement_nesting,
    TransformType.Jvp: _jvp_decrement_nesting,
    TransformType.Vmap: _vmap_decrement_nesting,
}


def run_uncompiled(restoration: Restoration) -> None:
    """Runs compiled parts uncompiled: hooks added after compilation would never fire."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:  # nothing is compiled before it is imported
        restoration.undo(setattr, dynamo, "_stance", dynamo._stance)
        torch.compiler.set_stance("force_eager")


def ignore_intended_warnings(restoration: Restoration) -> None:
    """Puts filters before the others, and takes them away from wherever threads have put them."""
    filters: list[Any] = warnings.filters  # pyright: ignore[reportAssignmentType]
    own = [("ignore", re.compile(message), Warning, None, 0) for message in INTENDED]
    restoration.undo(_restore_filters, filters, list(filters), own)
    filters[:0] = own


def _restore_filters(filters: list[Any], before: list[Any], own: list[Any]) -> None:
    present: list[Any] = warnings.filters  # pyright: ignore[reportAssignmentType]
    filters[:] = before
    if present is filters:
        return
    if threading.active_count() == 1:  # left behind by an exception inside of catch_warnings
        warnings.filters = filters
    else:  # another thread's, which it has copied from these
        present[:] = [f for f in present if not any(f is one for one in own)]


def leave_transforms(restoration: Restoration) -> None:
    """Ends what an interruption inside of `torch.func` or of batched gradients leaves in force."""
    restoration.undo(_leave_transforms, get_dynamic_layer_stack_depth())
    if not _batches_gradients():
        restoration.undo(_leave_batches)
    saved: Any = vars(torch._C)["_autograd"]  # hooks on tensors saved for backward passes
    if saved._saved_tensors_hooks_is_enabled():
        restoration.undo(saved._saved_tensors_hooks_enable)


def _leave_transforms(depth: int) -> None:
    # PyTorch's own function for this leaves two at a time in 2.11, and fails where there is one.
    while get_dynamic_layer_stack_depth() > depth:
        LEAVE[peek_interpreter_stack().key()]()


def _batches_gradients() -> bool:
    """Whether a gradient with ``is_grads_batched=True`` is formed, which has a vmap of its own."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def _leave_batches() -> None:
    while _batches_gradients():
        torch._C._vmapmode_decrement_nesting()
