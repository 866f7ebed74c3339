"""How a GPU rounds the factors of float32 products while a run is trained."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from biasshift.training.step import Precision


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """To TF32 for "tf32", not at all for the others, whatever the process is set to; its flags are restored at the end.

    Flags come in two generations. The older, global ones are set, because ``torch.compile`` reads those, which raises where the
    newer, of single operations, say something else. One that raises at the beginning is restored through the newer alone.
    """
    backends: Any = torch.backends  # pyright knows few of its flags
    older = (backends.cuda.matmul, backends.cudnn)
    newer = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    with ExitStack() as restoring:  # from the last to the first: each sets more than those after it
        for flag in newer:
            restoring.callback(setattr, flag, "fp32_precision", flag.fp32_precision)
        with suppress(RuntimeError):
            restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for flag in older:
            with suppress(RuntimeError):
                restoring.callback(setattr, flag, "allow_tf32", flag.allow_tf32)
        backends.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"  # as PyTorch begins
        for flag in older:
            flag.allow_tf32 = precision == "tf32"
        yield
