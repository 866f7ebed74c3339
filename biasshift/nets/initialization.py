"""Weight layers drawn from a generator of their own, alike for every activation function."""

import math
from collections.abc import Iterable
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

# Of the weights: He et al. 2015, normal and uniform; variance 1/fan_in, normal (LeCun et al. 1998);
# 2/(fan_in + fan_out), normal (Glorot & Bengio 2010).
Init = Literal["normal", "uniform", "lecun", "glorot"]
WeightLayer = TypeVar("WeightLayer", nn.Linear, nn.Conv2d)


def linear(
    fan_in: int,
    units: int,
    init: Init,
    generator: torch.Generator,
    sd: float | None = None,
) -> nn.Linear:
    """Returns a fully connected layer with random weights and biases of zero.

    With He et al. 2015, "normal" and "uniform", weights have variance ``2 / fan_in``: the mean
    square of the net inputs then stays the same from one ReLU layer to the next. The paper names it
    for its four activation functions on MNIST, and it is used for all others, too: equal seeds give
    equal weights whatever the activation. [open in the paper] With 2 the mean square changes by a
    factor ``2 E f(z)²`` a layer (z standard normal), which is 1 for ReLU: ELU 1.29, LReLU 1.01,
    SReLU 1.52, PReLU 1.06, SELU 2.00, GELU 0.85, SiLU 0.71, Mish 0.91, Softplus 1.84, tanh 0.79.
    With "lecun", the SELU's own, factors are half of these.

    Args:
        fan_in: the inputs of every unit.
        units: the outputs of the layer.
        init: "normal" draws from N(0, 2/fan_in), "uniform" from U(±√(6/fan_in)), "lecun" from
            N(0, 1/fan_in), "glorot" from N(0, 2/(fan_in + fan_out)).
        generator: the only source of the weights; the global random state is untouched.
        sd: standard deviation of normal weights, in place of `init`'s.

    Raises:
        ValueError: an unknown init, or a standard deviation that is negative or not finite.
    """
    # On the meta device a layer draws nothing; elsewhere it would take its own weights from the
    # global generator first.
    return _drawn(nn.Linear(fan_in, units, device="meta"), init, generator, sd)


def convolution(
    channels: int,
    units: int,
    field: int,
    init: Init,
    generator: torch.Generator,
    *,
    stride: int = 1,
    padding: int = 0,
    sd: float | None = None,
) -> nn.Conv2d:
    """Returns a convolution with a square receptive field of `field` × `field` pixels.

    Weights and biases are those of `linear`; the fan-in of a unit is its patch, ``channels ·
    field²``, and its fan-out ``units · field²``.

    Raises:
        ValueError: an unknown init, or a standard deviation that is negative or not finite.
    """
    layer = nn.Conv2d(channels, units, field, stride, padding, device="meta")
    return _drawn(layer, init, generator, sd)


def _drawn(
    layer: WeightLayer, init: Init, generator: torch.Generator, sd: float | None
) -> WeightLayer:
    refuse_unknown("init", init, get_args(Init))
    if sd is not None and not 0 <= sd < math.inf:
        raise ValueError(
            f"The standard deviation of weights must be a number of at least 0, got {sd}."
        )
    layer.to_empty(device="cpu")
    fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel()
    variance = {"lecun": 1 / fan_in, "glorot": 2 / (fan_in + fan_out)}.get(init, 2 / fan_in)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        if init == "uniform" and sd is None:
            bound = math.sqrt(3 * variance)
            layer.weight.uniform_(-bound, bound, generator=generator)
        else:
            scale = math.sqrt(variance) if sd is None else sd
            layer.weight.normal_(0, scale, generator=generator)
    return layer


def scaled_units(units: int, width: float) -> int:
    """Returns ``units · width``, rounded, at least 1: the same network, smaller, to try things out.

    Raises:
        ValueError: a width that is not positive and finite.

    >>> scaled_units(192, 0.01)
    2
    """
    if not 0 < width < math.inf:
        raise ValueError(
            f"'width' must be positive, got {width}. It multiplies the number of units of every "
            "hidden layer."
        )
    return max(1, round(units * width))


def refuse_unknown(option: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError where an option's value is not among the known ones.

    >>> refuse_unknown("init", "zeros", ["normal", "uniform"])
    Traceback (most recent call last):
    ValueError: 'init' must be one of normal, uniform, got 'zeros'.
    """
    if value not in known:
        raise ValueError(f"'{option}' must be one of {', '.join(known)}, got '{value}'.")
