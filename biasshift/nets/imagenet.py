"""The 15-layer network of the ImageNet experiment."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from biasshift.nets.convolution_stacks import NormAt, Stack, Style, convolutions
from biasshift.nets.initialization import Init, linear, shrunk
from biasshift.nets.pyramid import SpatialPyramidPooling

# Stacks of (layers, units, receptive field), section 4.4: 1×96×6, 3×512×3, 5×768×3, 3×1024×3
IMAGENET15: tuple[Stack, ...] = (((1, 96, 6),), ((3, 512, 3),), ((5, 768, 3),), ((3, 1024, 3),))
CONNECTED = (4096, 4096)  # units of the hidden fully connected layers


def imagenet15(
    activation: str = "elu",
    seed: int = 0,
    classes: int = 1000,
    stride: int = 2,
    bins: Sequence[int] = (1, 2, 4),
    batch_norm: bool = False,
    dropout: float = 0.5,
    init: Init = "normal",
    *,
    norm_at: NormAt = "before",
    width: float = 1.0,
) -> nn.Sequential:
    """The 15-layer network of Figure 6: (batch, 3, 224, 224) → (batch, classes) logits; 55.9 M parameters in its convolutions.

    Four stacks of convolutions, "conv1_1" … "conv4_3", with a 2×2 pooling behind each; spatial pyramid pooling, "pyramid"; two
    layers of 4096 units with dropout, "fc5_1" and "fc5_2"; the logits, "fc6_1". Normalization and activations are named alike.
    Images of other sizes work, as long as the last maps can be cut into the pyramid's bins.

    Args:
        activation: a name in `biasshift.activations.ACTIVATIONS`.
        seed: of the weights, drawn after He et al. 2015 from a generator of their own; biases are zero.
        stride: of the 6×6 layer, not in the paper. Stride 2 gives maps of 112, then 56, 28, 14 and 7 behind the poolings, and
            41 billion multiplications per image; stride 4 gives 56, 28, 14, 7 and 4, and 10 billion.
        bins: of the pyramid's three levels, not in the paper.
        batch_norm: normalizes every hidden layer, ``norm_at`` "before" or "after" its activation.
        dropout: the rate in both 4096 layers; 0 builds no dropout modules.
        init: "normal" or "uniform", as in `mlp`.
        width: multiplies the units of every hidden layer, for a quick look.

    Raises:
        ValueError: a name that is unknown, or a size or rate that makes no sense.

    >>> net = imagenet15(width=0.01, classes=5)
    >>> net.fc5_1, net(torch.zeros(1, 3, 112, 112)).shape
    (Linear(in_features=210, out_features=41, bias=True), torch.Size([1, 5]))
    """
    if classes < 1 or not 0 <= dropout < 1:
        raise ValueError(f"there must be classes, and a dropout rate from 0 to below 1; got classes {classes}, dropout {dropout}.")
    style = Style(activation, init, "same", batch_norm, norm_at, "all", width)
    generator = torch.Generator().manual_seed(seed)
    modules = OrderedDict(convolutions(IMAGENET15, style, generator, stride=stride))
    modules["pyramid"] = pyramid = SpatialPyramidPooling(bins)
    hidden = [pyramid.outputs(shrunk(IMAGENET15[-1][-1][1], width)), *(shrunk(units, width) for units in CONNECTED)]
    for place, (fan_in, units) in enumerate(pairwise(hidden), start=1):
        modules[f"fc5_{place}"] = linear(fan_in, units, init, generator)
        modules.update(style.behind(f"5_{place}", nn.BatchNorm1d(units), dropout, last=True))
    modules["fc6_1"] = linear(hidden[-1], classes, init, generator)
    return nn.Sequential(modules)
