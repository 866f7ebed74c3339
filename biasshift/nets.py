"""The paper's networks, as functions that return plain PyTorch modules."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from biasshift.activations import ACTIVATIONS


def mlp(
    inputs: int,
    hidden: int = 128,
    depth: int = 8,
    classes: int = 10,
    activation: str = "elu",
    seed: int = 0,
    init: Literal["normal", "uniform"] = "normal",
) -> nn.Sequential:
    """The fully connected classifier of Figure 2: `depth` hidden layers of `hidden` units, then `classes` logits.

    Weights follow He et al. 2015 for every activation: variance 2/fan_in; biases are zero. Equal seeds give equal
    weights whatever the activation, so runs of one number differ in nothing else. The layers are "0", "2", …, "2·depth",
    the activations between them "1", "3", ….

    Args:
        activation: a name in `biasshift.activations.ACTIVATIONS`.
        seed: of the weights. They are drawn from a generator of their own: the global random state is untouched.
        init: "normal" draws from N(0, 2/fan_in), "uniform" from U(±√(6/fan_in)). The paper leaves it open; the
            authors' own library drew uniformly.

    Raises:
        ValueError: an unknown activation or init, or a size below 1 (`depth` may be 0).

    >>> net = mlp(784, activation="relu")
    >>> len(net), net[0], net[1]
    (17, Linear(in_features=784, out_features=128, bias=True), ReLU())
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}'; known are {', '.join(ACTIVATIONS)}.")
    if min(inputs, hidden, classes) < 1 or depth < 0:
        raise ValueError(f"sizes must be positive, got inputs {inputs}, hidden {hidden}, classes {classes}, depth {depth}.")
    generator = torch.Generator().manual_seed(seed)
    widths = [inputs, *[hidden] * depth, classes]
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        modules += [_he_linear(fan_in, fan_out, init, generator), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def _he_linear(fan_in: int, fan_out: int, init: str, generator: torch.Generator) -> nn.Linear:
    # On the meta device Linear draws nothing; elsewhere it would take its own weights from the global generator first.
    layer = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.bias.zero_()
        if init == "normal":
            layer.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
        elif init == "uniform":
            bound = math.sqrt(6 / fan_in)
            layer.weight.uniform_(-bound, bound, generator=generator)
        else:
            raise ValueError(f"unknown init '{init}'; known are normal, uniform.")
    return layer
