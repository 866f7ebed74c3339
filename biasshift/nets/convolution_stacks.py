"""Stacks of convolutions with max-pooling behind each, built from the lists the paper prints."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from biasshift.nets.activation_modules import (
    Activation,
    ActivationModules,
    activation_constructor,
    activation_module,
)
from biasshift.nets.initialization import (
    Init,
    convolution,
    refuse_unknown,
    scaled_units,
)
from biasshift.nets.modules import StackDropout

Stack = Sequence[tuple[int, int, int]]  # layers × units × receptive field, as in [1×192×1, 1×240×3]
Geometry = Literal["same", "caffe"]
NormAt = Literal["before", "after"]
Dropout = Literal["none", "last", "all"]
NamedModules = Iterator[tuple[str, nn.Module]]


class Flattened(nn.Module):
    """(batch, classes, 1, 1) → (batch, classes).

    Larger maps are refused: their pixels would pass for more classes.
    """

    def forward(
        self, x: Float[Tensor, "batch classes height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Returns the one pixel of every map."""
        if x.shape[2:] != (1, 1):
            raise ValueError(
                f"Maps of the last layer must be down to one pixel, got {x.shape[2]} × "
                f"{x.shape[3]}. Give smaller images, or more stacks."
            )
        return x.flatten(1)


@dataclass(frozen=True)
class Style:
    """What surrounds the weights, alike in every layer of a network.

    The fields are the arguments of `stacks` of the same names.

    Raises:
        ValueError: a name that is unknown, or a width that is not positive.
    """

    activation: Activation = "elu"
    init: Init = "normal"
    geometry: Geometry = "same"
    batch_norm: bool = False
    norm_at: NormAt = "before"
    dropout: Dropout = "none"
    width: float = 1.0
    last_init: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.activation, ActivationModules):  # which are checked
            activation_constructor(self.activation)
        scaled_units(1, self.width)
        refuse_unknown("geometry", self.geometry, get_args(Geometry))
        refuse_unknown("norm_at", self.norm_at, get_args(NormAt))
        refuse_unknown("dropout", self.dropout, get_args(Dropout))

    def _new_activation(self) -> nn.Module:
        if isinstance(self.activation, ActivationModules):
            return self.activation()
        return activation_module(self.activation)

    def followers(self, layer: str, norm: nn.Module, rate: float, last: bool) -> NamedModules:
        """Yields what follows the weights of a hidden layer: normalization, activation, dropout.

        Args:
            layer: stack and place, such as "2_1"; the names are "bn2_1", "act2_1" and "drop2_1".
            norm: the normalization, left out unless `batch_norm` is set.
            rate: the dropout rate of the stack; 0 yields no dropout.
            last: whether the layer is the last of its stack.
        """
        modules = [(f"act{layer}", self._new_activation())]
        if self.batch_norm:
            modules.insert(0 if self.norm_at == "before" else 1, (f"bn{layer}", norm))
        yield from modules
        if rate > 0 and self.dropout != "none":
            yield f"drop{layer}", StackDropout(rate, last, last or self.dropout == "all")


def stacks(
    specification: Sequence[Stack],
    activation: Activation = "elu",
    seed: int = 0,
    *,
    rates: Sequence[float] = (),
    geometry: Geometry = "same",
    batch_norm: bool = False,
    norm_at: NormAt = "before",
    dropout: Dropout = "last",
    init: Init = "normal",
    last_init: float | None = None,
    width: float = 1.0,
    channels: int = 3,
) -> nn.Sequential:
    """Returns a convolutional classifier of the given stacks; the last layer gives the logits.

    Modules are named by stack and layer: "conv2_1", "bn2_1", "act2_1", "drop2_1", and "pool2"
    behind stack 2. Names and weights depend neither on the activation nor on which other modules
    there are: state dicts load across activations, dropout and phases. No
    normalization, activation or dropout follows the last layer; its maps are pooled, and must be
    down to one pixel then. Convolutions keep their bias before a normalization, which makes it
    idle, so that the weights are those of the net without. Paddings, poolings and dropout count as
    activations in `biasshift.activation_moments`; for the activation functions alone,
    ``layers=lambda name, module: name.startswith("act")``.

    Args:
        specification: the stacks, each a list of (layers, units, receptive field); the last one
            ends with a layer of as many units as there are classes.
        activation: a name in `biasshift.activations.ACTIVATIONS`, ``elu:α``, ``lrelu:slope``,
            an import path ``package.module:Class``, or a class of modules.
        seed: of the weights, drawn from a generator of their own; biases are zero.
        rates: dropout rate of each stack, 0 for those beyond the list. The paper does not say on
            which side of the pooling it drops; here it is directly behind the activation.
        geometry: "same" keeps the size of the maps (2×2 kernels get their row of zeros at the end),
            so only pooling halves it. "caffe" pads half the kernel, rounded down, on *every* side:
            a 2×2 kernel adds a row and a column. Pooling rounds sizes up in both; maps of 1×1 it
            leaves alone.
        batch_norm: normalizes every hidden layer. Where is not in the paper: ``norm_at`` "before"
            or "after" the activation.
        dropout: behind the "last" or "all" layers of each stack (`set_dropout` changes it later),
            or "none": no such modules.
        init: "normal", "uniform", "lecun" or "glorot", as in `mlp`.
        last_init: standard deviation of the last layer's weights; None: that of `init`. Where it is
            small, the first losses are near ln(classes).
        width: multiplies the units of every hidden layer, to try things out on a small network.
        channels: of the images.

    Raises:
        ValueError: a name that is unknown, a specification with a size below 1, or rates that do
            not fit it. On a call: images so large that more than a pixel is left.

    >>> net = stacks([[(1, 8, 3)], [(2, 16, 2)], [(1, 10, 1)]], rates=[0.0, 0.1], geometry="caffe")
    >>> " ".join(name for name, _ in net.named_children())
    'conv1_1 act1_1 pool1 conv2_1 act2_1 drop2_1 conv2_2 act2_2 drop2_2 pool2 conv3_1 pool3 flatten'
    """
    activations = ActivationModules(activation, seed)
    style = Style(activations, init, geometry, batch_norm, norm_at, dropout, width, last_init)
    generator = torch.Generator().manual_seed(seed)
    modules = OrderedDict(
        convolutions(specification, style, generator, rates=rates, channels=channels, logits=True)
    )
    return nn.Sequential(modules | {"flatten": Flattened()})


def convolutions(
    specification: Sequence[Stack],
    style: Style,
    generator: torch.Generator,
    *,
    rates: Sequence[float] = (),
    channels: int = 3,
    stride: int = 1,
    logits: bool = False,
) -> NamedModules:
    """Yields the modules of all stacks by name, in the order of the forward pass.

    Args:
        specification: the stacks, as in `stacks`.
        style: what surrounds the weights.
        generator: the only source of the weights.
        rates: dropout rate of each stack, 0 for those beyond the list.
        channels: of the images.
        stride: of the first layer; the others have 1.
        logits: whether the last layer gives the logits; else it is hidden as the others.

    Raises:
        ValueError: a specification with a size below 1, or rates that do not fit it.
    """
    _refuse(specification, rates, channels, stride, logits)
    for number, stack in enumerate(specification, start=1):
        layers = [(units, field) for count, units, field in stack for _ in range(count)]
        rate = rates[number - 1] if number <= len(rates) else 0.0
        for place, (units, field) in enumerate(layers, start=1):
            layer, last = f"{number}_{place}", place == len(layers)
            output = logits and last and number == len(specification)
            units = units if output else scaled_units(units, style.width)
            sd = style.last_init if output else None
            yield from _padded_convolution(
                layer, channels, units, field, stride, style, generator, sd
            )
            if not output:
                yield from style.followers(layer, nn.BatchNorm2d(units), rate, last)
            channels, stride = units, 1
        yield f"pool{number}", nn.MaxPool2d(2, 2, ceil_mode=True)


def _padded_convolution(
    layer: str,
    channels: int,
    units: int,
    field: int,
    stride: int,
    style: Style,
    generator: torch.Generator,
    sd: float | None,
) -> NamedModules:
    """One convolution, behind a padding of its own where the zeros of two opposite sides differ."""
    total = 2 * (field // 2) if style.geometry == "caffe" else max(field - stride, 0)
    before, after = total // 2, total - total // 2
    if before != after:
        # padding="same" would do, but warns on every even kernel, and knows no strides
        yield f"pad{layer}", nn.ZeroPad2d((before, after, before, after))
    padding = before if before == after else 0
    places = {"stride": stride, "padding": padding}
    yield (
        f"conv{layer}",
        convolution(channels, units, field, style.init, generator, **places, sd=sd),
    )


def _refuse(
    specification: Sequence[Stack], rates: Sequence[float], channels: int, stride: int, logits: bool
) -> None:
    if not specification or not all(specification):
        raise ValueError(
            f"'specification' must have at least one stack, and a stack at least one layer, got "
            f"{specification}."
        )
    if min(channels, stride, *(min(sizes) for stack in specification for sizes in stack)) < 1:
        raise ValueError(
            f"Layers, units and receptive fields must be positive, got {specification}, channels "
            f"{channels}, stride {stride}."
        )
    if len(rates) > len(specification):
        raise ValueError(
            f"'rates' must have at most one dropout rate per stack, got {len(rates)} for "
            f"{len(specification)} stacks."
        )
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"'rates' must lie from 0 to below 1, got {tuple(rates)}.")
    if logits and len(rates) == len(specification) and rates[-1] > 0:
        raise ValueError(
            "'rates' must be 0 for the last stack, which gives the logits: they are not dropped. "
            f"Got {rates[-1]}."
        )
