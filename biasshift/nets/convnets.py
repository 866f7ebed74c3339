"""The paper's convolutional networks: 11 and 18 layers for CIFAR, 15 layers for ImageNet.

On CIFAR the network of 11 layers compares activations, and that of 18 has the lowest error.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from biasshift.nets.activation_modules import Activation, ActivationModules
from biasshift.nets.convolution_stacks import (
    Dropout,
    Geometry,
    NormAt,
    Stack,
    Style,
    convolutions,
    stacks,
)
from biasshift.nets.initialization import Init, linear, scaled_units
from biasshift.nets.modules import SpatialPyramidPooling

# Stacks of (layers, units, receptive field), section 4.2: [1×192×5], [1×192×1, 1×240×3], …
CIFAR11: tuple[Stack, ...] = (
    ((1, 192, 5),),
    ((1, 192, 1), (1, 240, 3)),
    ((1, 240, 1), (1, 260, 2)),
    ((1, 260, 1), (1, 280, 2)),
    ((1, 280, 1), (1, 300, 2)),
    ((1, 300, 1),),
    ((1, 100, 1),),
)
# Section 4.3 calls it 18 layers; its list has 19.
CIFAR18: tuple[Stack, ...] = (
    ((1, 384, 3),),
    ((1, 384, 1), (1, 384, 2), (2, 640, 2)),
    ((1, 640, 1), (3, 768, 2)),
    ((1, 768, 1), (2, 896, 2)),
    ((1, 896, 3), (2, 1024, 2)),
    ((1, 1024, 1), (1, 1152, 2)),
    ((1, 1152, 1),),
    ((1, 100, 1),),
)
# The same seven rates for both networks, whose eighth stack, if there is one, has none: it gives
# the logits. The seventh of the 18-layer net then has the rate 0 printed last; that a rate between
# .5 and 0 was left out is as likely (give `rates`).
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)
# Section 4.4: 1×96×6, 3×512×3, 5×768×3, 3×1024×3
IMAGENET15: tuple[Stack, ...] = (((1, 96, 6),), ((3, 512, 3),), ((5, 768, 3),), ((3, 1024, 3),))
FULLY_CONNECTED = (4096, 4096)  # units of its hidden fully connected layers


def cifar11(
    activation: Activation = "elu",
    seed: int = 0,
    classes: int = 100,
    geometry: Geometry = "same",
    batch_norm: bool = False,
    dropout: Dropout = "last",
    init: Init = "normal",
    *,
    norm_at: NormAt = "before",
    rates: Sequence[float] = RATES,
    width: float = 1.0,
    last_init: float | None = None,
) -> nn.Sequential:
    """Returns the 11-layer network of Figures 4 and 5: (batch, 3, 32, 32) → (batch, classes).

    It has 1,669,028 parameters, and its outputs are logits. Arguments and module names are those of
    `stacks`. The geometry is not in the paper. "same" gives maps of 32-16-8-4-2-1-1-1, and the last
    two poolings do nothing; "caffe", probably the original, 32-16-8-5-3-2-1-1.

    >>> sum(p.numel() for p in cifar11().parameters())
    1669028
    """
    return stacks(
        (*CIFAR11[:-1], ((1, classes, 1),)),
        activation,
        seed,
        rates=rates,
        geometry=geometry,
        batch_norm=batch_norm,
        norm_at=norm_at,
        dropout=dropout,
        init=init,
        last_init=last_init,
        width=width,
    )


def cifar18(
    activation: Activation = "elu",
    seed: int = 0,
    classes: int = 100,
    geometry: Geometry = "same",
    batch_norm: bool = False,
    dropout: Dropout = "last",
    init: Init = "normal",
    *,
    norm_at: NormAt = "before",
    rates: Sequence[float] = RATES,
    width: float = 1.0,
    last_init: float | None = None,
) -> nn.Sequential:
    """Returns the 18-layer network of Table 1: (batch, 3, 32, 32) → (batch, classes).

    It has 39,330,404 parameters, and its outputs are logits. Arguments and module names are those
    of `stacks`. Maps are 32-16-8-4-2-1-1-1-1 ("same") or 32-16-10-7-5-4-3-2-1 ("caffe", where even
    the logits are pooled, from 2×2). For fine-tuning, `set_dropout` puts dropout behind all layers.

    >>> [name for name, _ in cifar18(width=0.01).named_children()][-4:]
    ['pool7', 'conv8_1', 'pool8', 'flatten']
    """
    return stacks(
        (*CIFAR18[:-1], ((1, classes, 1),)),
        activation,
        seed,
        rates=rates,
        geometry=geometry,
        batch_norm=batch_norm,
        norm_at=norm_at,
        dropout=dropout,
        init=init,
        last_init=last_init,
        width=width,
    )


def imagenet15(
    activation: Activation = "elu",
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
    last_init: float | None = None,
) -> nn.Sequential:
    """Returns the 15-layer network of Figure 6: (batch, 3, 224, 224) → (batch, classes).

    Its convolutions have 55.9 M parameters, and its outputs are logits. There are four stacks of
    convolutions, "conv1_1" … "conv4_3", with a 2×2 pooling behind each, and spatial pyramid
    pooling, "pyramid". Two layers of 4096 units with dropout follow, "fc5_1" and "fc5_2", and the
    logits, "fc6_1". Normalization and activations are named alike. Images of other sizes work, as
    long as the last maps can be cut into the pyramid's bins.

    Args:
        activation: a name in `biasshift.activations.ACTIVATIONS`, ``elu:α``, ``lrelu:slope``,
            an import path ``package.module:Class``, or a class of modules.
        seed: of the weights, drawn from a generator of their own; biases are zero.
        stride: of the 6×6 layer, not in the paper. Stride 2 gives maps of 112, then 56, 28, 14 and
            7 behind the poolings, and 41 billion multiplications per image. Stride 4 gives 56, 28,
            14, 7 and 4, and 10 billion.
        bins: of the pyramid's three levels, not in the paper.
        batch_norm: normalizes every hidden layer, ``norm_at`` "before" or "after" its activation.
        dropout: the rate in both 4096 layers; 0 builds no dropout modules.
        init: "normal", "uniform", "lecun" or "glorot", as in `mlp`.
        width: multiplies the units of every hidden layer, to try things out on a small network.
        last_init: standard deviation of the last layer's weights; None: that of `init`.

    Raises:
        ValueError: a name that is unknown, or a size or rate that makes no sense.

    >>> net = imagenet15(width=0.01, classes=5)
    >>> net.fc5_1, net(torch.zeros(1, 3, 112, 112)).shape
    (Linear(in_features=210, out_features=41, bias=True), torch.Size([1, 5]))
    """
    if classes < 1 or not 0 <= dropout < 1:
        raise ValueError(
            "'classes' must be at least 1, and 'dropout' a rate from 0 to below 1, got classes "
            f"{classes}, dropout {dropout}."
        )
    activations = ActivationModules(activation, seed)
    style = Style(activations, init, "same", batch_norm, norm_at, "all", width)
    generator = torch.Generator().manual_seed(seed)
    modules = OrderedDict(convolutions(IMAGENET15, style, generator, stride=stride))
    modules["pyramid"] = pyramid = SpatialPyramidPooling(bins)
    channels = scaled_units(IMAGENET15[-1][-1][1], width)
    hidden = [pyramid.outputs(channels), *(scaled_units(units, width) for units in FULLY_CONNECTED)]
    for place, (fan_in, units) in enumerate(pairwise(hidden), start=1):
        modules[f"fc5_{place}"] = linear(fan_in, units, init, generator)
        modules.update(style.followers(f"5_{place}", nn.BatchNorm1d(units), dropout, last=True))
    modules["fc6_1"] = linear(hidden[-1], classes, init, generator, last_init)
    return nn.Sequential(modules)
