"""What every network is built from: weight layers drawn from a generator, and activations by name."""

import math
from typing import Literal, TypeVar

import torch
from torch import nn

from biasshift.activations import ACTIVATIONS

Init = Literal["normal", "uniform"]
WeightLayer = TypeVar("WeightLayer", nn.Linear, nn.Conv2d)


def linear(fan_in: int, units: int, init: Init, generator: torch.Generator) -> nn.Linear:
    """A fully connected layer, weights after He et al. 2015, biases zero."""
    # On the meta device a layer draws nothing; elsewhere it would take its own weights from the
    # global generator first.
    return _he(nn.Linear(fan_in, units, device="meta"), init, generator)


def convolution(
    channels: int,
    units: int,
    field: int,
    init: Init,
    generator: torch.Generator,
    *,
    stride: int = 1,
    padding: int = 0,
) -> nn.Conv2d:
    """A convolution with a square receptive field; weights and biases as in `linear`, a unit's
    fan-in being its patch.
    """
    return _he(nn.Conv2d(channels, units, field, stride, padding, device="meta"), init, generator)


def _he(layer: WeightLayer, init: Init, generator: torch.Generator) -> WeightLayer:
    layer.to_empty(device="cpu")
    fan_in = layer.weight[0].numel()
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        if init == "normal":
            layer.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
        elif init == "uniform":
            bound = math.sqrt(6 / fan_in)
            layer.weight.uniform_(-bound, bound, generator=generator)
        else:
            raise ValueError(f"unknown init '{init}'; known are normal, uniform.")
    return layer


def activation_named(name: str) -> nn.Module:
    """A new activation module.

    Raises:
        ValueError: a name that is not in `biasshift.activations.ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{name}'; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def shrunk(units: int, width: float) -> int:
    """``units · width``, rounded, at least 1: the same network, small enough for a quick look.

    Raises:
        ValueError: a width that is not positive.
    """
    if not 0 < width < math.inf:
        raise ValueError(
            f"width {width} must be positive: it multiplies the number of units of every hidden "
            "layer."
        )
    return max(1, round(units * width))
