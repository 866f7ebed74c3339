"""Dropout that knows its stack's rate, so that a later phase of training can set it anew on the
same network.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Where = Literal["last", "all"]


class StackDropout(nn.Dropout):
    """`torch.nn.Dropout` behind one layer of a stack.

    At ``p = 0`` it hands its input on: no copy, no random number, no mask held for the backward
    pass. It costs one Python call in a forward pass, and one more entry in
    `biasshift.activation_moments`, with the numbers of the activation before it.

    Args:
        rate: the stack's dropout rate, from which `set_dropout` finds ``p`` in every phase.
        last: whether the layer is the last of its stack.
        active: whether ``p`` is the rate, and not 0, to begin with.
    """

    def __init__(self, rate: float, last: bool, active: bool):
        super().__init__(rate if active else 0.0)
        self.rate = rate
        self.last = last


def set_dropout(model: nn.Module, where: Where = "last", factor: float = 1.0) -> None:
    """Sets ``p`` of every dropout module of a network of this package to ``factor`` times its
    stack's rate, in place.

    The 18-layer network is trained with "last", fine-tuned with "all", and then with "all" and a
    factor of 1.5. Rates are always those of the stacks: factors do not pile up. A state dict holds
    no rates; say it again after loading one.

    Args:
        where: "last" drops behind the last layer of each stack, "all" behind all layers.

    Raises:
        ValueError: a rate would leave [0, 1), ``where`` is unknown, or the network has no dropout.
            Nothing has changed then.

    >>> net = nn.Sequential(StackDropout(0.2, last=False, active=False), StackDropout(0.2, last=True, active=True))
    >>> set_dropout(net, "all", 1.5)
    >>> [round(module.p, 3) for module in net]
    [0.3, 0.3]
    """
    dropouts = [module for module in model.modules() if isinstance(module, StackDropout)]
    if where not in ("last", "all"):
        raise ValueError(
            f"dropout goes behind the 'last' or 'all' layers of a stack, got '{where}'."
        )
    if not dropouts:
        raise ValueError(
            "the network has no dropout to set: build it with dropout='last' or 'all'."
        )
    highest = max(module.rate for module in dropouts)
    if not 0 <= factor * highest < 1:
        raise ValueError(
            f"factor {factor} makes the dropout rate {highest} {factor * highest}: rates lie from "
            "0 to below 1."
        )
    for module in dropouts:
        module.p = factor * module.rate if module.last or where == "all" else 0.0


# -- spatial pyramid pooling (He et al. 2014) --------------------------------------------------


class SpatialPyramidPooling(nn.Module):
    """Cuts each map into n × n bins, for every level n, and keeps the largest value in each:
    channels × Σ n² outputs.

    Bin i covers the rows from ⌊i·h/n⌋ to before ⌈(i+1)·h/n⌉, columns likewise, so that bins overlap
    by one where n does not divide h. Outputs come level by level, within a level channel by
    channel, then bin by bin in reading order.

    Args:
        bins: n of each level. The paper says three levels and not which.

    Raises:
        ValueError: no levels, or a level below 1; on a call, a map with fewer rows or columns than
            a level has bins.

    >>> SpatialPyramidPooling((1, 2))(torch.arange(16.0).view(1, 1, 4, 4))
    tensor([[15.,  5.,  7., 13., 15.]])
    """

    def __init__(self, bins: Sequence[int] = (1, 2, 4)):
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(f"a pyramid needs levels of at least 1 × 1 bins, got {tuple(bins)}.")
        self.bins = tuple(bins)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs"]:
        height, width = x.shape[-2:]
        if min(height, width) < max(self.bins):
            raise ValueError(
                f"maps of {height} × {width} cannot be cut into {max(self.bins)} × "
                f"{max(self.bins)} bins: "
                "give larger images, a smaller stride, or fewer bins."
            )
        return torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in self.bins], 1)

    def outputs(self, channels: int) -> int:
        """The length of the vector."""
        return channels * sum(n * n for n in self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"
