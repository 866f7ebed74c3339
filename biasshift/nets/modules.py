"""Two modules of the convolutional networks: dropout with phases, and spatial pyramid pooling.

`set_dropout` changes the dropout of a network from one phase of training to the next. Spatial
pyramid pooling, of He et al. 2014, makes vectors of one length from maps of any size.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from biasshift.nets.initialization import refuse_unknown

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
    """Sets ``p`` of every dropout module of a network to ``factor`` times its stack's rate.

    The network is changed in place; it must be one of this package. The 18-layer network is trained
    with "last", fine-tuned with "all", and then with "all" and a factor of 1.5. Rates are always
    those of the stacks: factors do not accumulate. A state dict holds no rates; call `set_dropout`
    again after loading one.

    Args:
        where: "last" drops behind the last layer of each stack, "all" behind all layers.
        factor: multiplies every rate.

    Raises:
        ValueError: a rate would leave [0, 1), ``where`` is unknown, or the network has no dropout.
            Nothing has changed then.

    >>> inner, last = StackDropout(0.2, False, active=False), StackDropout(0.2, True, active=True)
    >>> set_dropout(nn.Sequential(inner, last), "all", 1.5)
    >>> round(inner.p, 3), round(last.p, 3)
    (0.3, 0.3)
    """
    refuse_unknown("where", where, get_args(Where))
    dropouts = [module for module in model.modules() if isinstance(module, StackDropout)]
    if not dropouts:
        raise ValueError("'model' must have dropout to set. Build it with dropout='last' or 'all'.")
    highest = max(module.rate for module in dropouts)
    if not 0 <= factor * highest < 1:
        raise ValueError(
            f"'factor' must leave dropout rates from 0 to below 1, got {factor}, which makes "
            f"{highest} {factor * highest}."
        )
    for module in dropouts:
        module.p = factor * module.rate if module.last or where == "all" else 0.0


class SpatialPyramidPooling(nn.Module):
    """The largest values of each map in n × n bins, for every level n: channels × Σ n² outputs.

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
            raise ValueError(f"'bins' must be levels of at least 1 × 1 bins, got {tuple(bins)}.")
        self.bins = tuple(bins)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs"]:
        """Returns the largest value of every bin, level by level, as one vector per example."""
        height, width = x.shape[-2:]
        if min(height, width) < (most := max(self.bins)):
            raise ValueError(
                f"Maps of {height} × {width} pixels cannot be cut into {most} × {most} bins. "
                "Give larger images, a smaller stride, or fewer bins."
            )
        return torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in self.bins], 1)

    def outputs(self, channels: int) -> int:
        """Returns the length of the vector for maps of `channels` channels, ``channels · Σ n²``.

        >>> SpatialPyramidPooling((1, 2, 4)).outputs(1024)
        21504
        """
        return channels * sum(n * n for n in self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"
