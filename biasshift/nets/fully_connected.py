"""The fully connected networks of the MNIST experiments: the classifier and the autoencoder."""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from biasshift.nets.activation_modules import Activation, ActivationModules
from biasshift.nets.initialization import (
    Init,
    linear,
    refuse_unknown,
    scaled_units,
)

# The encoder's layers and, mirrored, the decoder's (Desjardins et al. 2015).
ENCODER = (1000, 500, 250, 30)


class Shifted(nn.Module):
    """An activation plus a constant, ``activation(x) + constant``.

    The constant moves the mean activation and nothing else: an intervention on what the theory is
    about. The next layer can absorb it: with its bias lowered by ``constant · Σ_j w_j`` the network
    computes the same function. What learning does differently from there on, the constant caused.

    Raises:
        ValueError: an activation with parameters, or a constant that is not finite.

    >>> Shifted(nn.ReLU(), 0.5)(torch.tensor([-1.0, 2.0]))
    tensor([0.5000, 2.5000])
    """

    def __init__(self, activation: nn.Module, constant: float):
        super().__init__()
        if any(True for _ in activation.parameters()):
            raise ValueError(
                "'activation' must not have parameters, which Shifted would hide from the "
                f"optimizer, got {type(activation).__name__}."
            )
        if not math.isfinite(constant):
            raise ValueError(
                f"'constant', added to every activation, must be finite, got {constant}."
            )
        # In a tuple it is no child: measurements take the childless module, constant included, for
        # the activation.
        self.inner = (activation,)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``activation(x) + constant``."""
        return self.inner[0](x) + self.constant

    def extra_repr(self) -> str:
        return f"{self.inner[0]}, constant={self.constant}"


def mlp(
    inputs: int,
    hidden: int = 128,
    depth: int = 8,
    classes: int = 10,
    activation: Activation = "elu",
    seed: int = 0,
    init: Init = "normal",
    constant: float = 0.0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Returns the fully connected classifier of Figure 2: (batch, inputs) → (batch, classes).

    It has `depth` hidden layers of `hidden` units, and its outputs are logits. Weights follow He et
    al. 2015 for every activation: variance 2/fan_in; biases are zero. Equal seeds give equal
    weights whatever the activation, so runs of one number differ in nothing else. The layers are
    "0", "2", …, "2·depth", the activations between them "1", "3", ….

    Args:
        activation: a name in `biasshift.activations.ACTIVATIONS`, ``elu:α``, ``lrelu:slope``,
            an import path ``package.module:Class``, or a class of modules.
        seed: of the weights. They are drawn from a generator of their own: the global random state
            is untouched.
        init: "normal" draws from N(0, 2/fan_in), "uniform" from U(±√(6/fan_in)). The paper leaves
            it open; the authors' own library drew uniformly. "lecun" draws from N(0, 1/fan_in),
            "glorot" from N(0, 2/(fan_in + fan_out)).
        constant: added to every activation's output (`Shifted`); names and weights stay the same.
            Not in the paper.
        batch_norm: normalizes every hidden layer before its activation, in "norm0", "norm2", …; the
            other names and the weights stay the same. Not in the paper for this network.

    Raises:
        ValueError: an unknown activation or init, a size below 1 (`depth` may be 0), or a constant
            that is not finite.

    >>> net = mlp(784, activation="relu")
    >>> len(net), net[0], net[1]
    (17, Linear(in_features=784, out_features=128, bias=True), ReLU())
    """
    new_activation = ActivationModules(activation, seed)
    if min(inputs, hidden, classes) < 1 or depth < 0:
        raise ValueError(
            f"Sizes must be positive, got inputs {inputs}, hidden {hidden}, classes {classes}, "
            f"depth {depth}."
        )
    generator = torch.Generator().manual_seed(seed)
    widths = [inputs, *[hidden] * depth, classes]
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (fan_in, units) in enumerate(pairwise(widths)):
        modules[f"{2 * number}"] = linear(fan_in, units, init, generator)
        if number < depth:
            if batch_norm:
                modules[f"norm{2 * number}"] = nn.BatchNorm1d(units)
            module = new_activation()
            modules[f"{2 * number + 1}"] = Shifted(module, constant) if constant else module
    return nn.Sequential(modules)


def autoencoder(
    activation: Activation = "elu",
    seed: int = 0,
    init: Init = "normal",
    *,
    inputs: int = 784,
    code: Literal["linear", "activation"] = "linear",
    output: Literal["logits", "logistic"] = "logits",
    width: float = 1.0,
) -> nn.Sequential:
    """Returns the deep autoencoder of Figure 3: (batch, 784) → (batch, 784) **logits**.

    It has 784-1000-500-250-30-250-500-1000-784 units. The layers are "fc1" … "fc8", the activations
    behind them "act1" … "act7"; the 30 code units come out of "fc4". Equal seeds give equal weights
    whatever the activation.

    The paper leaves loss, code and output unit open. The defaults are Martens 2010's: a linear
    code, logistic outputs and the cross-entropy, ``F.binary_cross_entropy_with_logits(net(x), x,
    reduction="none").sum(1).mean()``, measured with ``likelihood="bernoulli"``. The reconstruction
    is ``net(x).sigmoid()``, and the paper's *reconstruction error* is read as its squared distance
    from x. For linear outputs with a squared error, the same net's output is the reconstruction.

    Args:
        activation: a name in `biasshift.activations.ACTIVATIONS`, ``elu:α``, ``lrelu:slope``,
            an import path ``package.module:Class``, or a class of modules.
        seed: of the weights, drawn from a generator of their own.
        init: "normal", "uniform", "lecun" or "glorot", as in `mlp`.
        code: "activation" puts "act4" behind the code layer.
        output: "logistic" appends the sigmoid, "reconstruct", for a squared error on the
            reconstruction (``"gaussian"``).
        inputs: pixels of an image; also the number of outputs.
        width: multiplies the units of every hidden layer, the code's too.

    Raises:
        ValueError: an unknown activation, init, code or output, fewer inputs than 1, or a width
            that is not positive.

    >>> [layer.out_features for layer in autoencoder() if isinstance(layer, nn.Linear)]
    [1000, 500, 250, 30, 250, 500, 1000, 784]
    """
    refuse_unknown("code", code, ("linear", "activation"))
    refuse_unknown("output", output, ("logits", "logistic"))
    if inputs < 1:
        raise ValueError(f"'inputs' must be at least 1, got {inputs}.")
    new_activation = ActivationModules(activation, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = [scaled_units(units, width) for units in ENCODER]
    widths = [inputs, *hidden, *hidden[-2::-1], inputs]
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (fan_in, units) in enumerate(pairwise(widths), start=1):
        modules[f"fc{number}"] = linear(fan_in, units, init, generator)
        if number < 2 * len(ENCODER) and (number != len(ENCODER) or code == "activation"):
            modules[f"act{number}"] = new_activation()
    if output == "logistic":
        modules["reconstruct"] = nn.Sigmoid()
    return nn.Sequential(modules)
