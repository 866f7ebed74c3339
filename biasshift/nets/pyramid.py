"""Spatial pyramid pooling (He et al. 2014): maps of any size become one vector of a fixed length."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SpatialPyramidPooling(nn.Module):
    """Cuts each map into n × n bins, for every level n, and keeps the largest value in each: channels × Σ n² outputs.

    Bin i covers the rows from ⌊i·h/n⌋ to before ⌈(i+1)·h/n⌉, columns likewise, so that bins overlap by one where n does not
    divide h. Outputs come level by level, within a level channel by channel, then bin by bin in reading order.

    Args:
        bins: n of each level. The paper says three levels and not which.

    Raises:
        ValueError: no levels, or a level below 1; on a call, a map with fewer rows or columns than a level has bins.

    >>> SpatialPyramidPooling((1, 2))(torch.arange(16.0).view(1, 1, 4, 4))
    tensor([[15.,  5.,  7., 13., 15.]])
    """

    def __init__(self, bins: Sequence[int] = (1, 2, 4)):
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(f"a pyramid needs levels of at least 1 × 1 bins, got {tuple(bins)}.")
        self.bins = tuple(bins)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        height, width = x.shape[-2:]
        if min(height, width) < max(self.bins):
            raise ValueError(
                f"maps of {height} × {width} cannot be cut into {max(self.bins)} × {max(self.bins)} bins: "
                "give larger images, a smaller stride, or fewer bins."
            )
        return torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in self.bins], 1)

    def outputs(self, channels: int) -> int:
        """The length of the vector."""
        return channels * sum(n * n for n in self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"
