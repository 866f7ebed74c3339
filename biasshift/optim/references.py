"""The points that sums are about: the first batch's means, the same for all processes."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.batch_sums import summed_patches


class References:
    """The reference of every layer by name, (groups, inputs), made when it is asked for first."""

    def __init__(self, distributed: bool) -> None:
        self.distributed = distributed
        self.known: dict[str, Tensor] = {}

    def dtype(self, name: str, module: WeightLayer) -> torch.dtype:
        """Returns the dtype of a layer's sums: that of its weights, but at least float32."""
        known = self.known.get(name)
        return layer_types.dtype_of_sums(module.weight) if known is None else known.dtype

    def of(self, name: str, mean: Callable[[], Tensor]) -> Tensor:
        """Returns the reference of a layer, by default the mean of its present batch."""
        if name not in self.known:
            reference = mean().detach().clone(memory_format=torch.contiguous_format)
            if self.distributed:
                dist.broadcast(reference, 0)
            self.known[name] = reference
        return self.known[name]

    def of_convolution(self, name: str, module: _ConvNd, a: Tensor, shape: torch.Size) -> Tensor:
        """Returns the reference of a convolution, whose patches need not be formed for it."""

        def mean() -> Tensor:
            total, positions = summed_patches(module, a, shape)
            return total / positions

        return self.of(name, mean)
