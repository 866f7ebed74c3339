"""What a unit is, layer kind by layer kind: its incoming activations, its errors, its weights.

A linear layer has one position per leading index behind the examples; a convolution one per place
of its kernel, where the incoming activations are the patch under the kernel (zeros of the padding
included). Grouped convolutions have one set of incoming activations per group. A position of a
transposed convolution is a place of its *output*: what comes in there is the patch of the input
spread out with zeros in between, under the flipped kernel.

The weights of a unit are in the order (channel of the group, then the places of the kernel), as in
the ``weight`` of a convolution: `weights` reads them as (units, inputs), and `as_weight` writes
such a matrix, an update for example, back.
"""

import math
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy as is_lazy_parameter
from torch.nn.utils.parametrize import is_parametrized

WeightLayer = nn.Linear | _ConvNd
Patches = Float[Tensor, "batch positions groups inputs"]
Errors = Float[Tensor, "*passes batch positions units"]

UNCOVERED: dict[type[nn.Module], str] = {
    nn.RNNBase: "its net inputs are inside a fused kernel",
    nn.RNNCellBase: "its net inputs are inside a fused kernel",
    nn.MultiheadAttention: "its projections are applied inside one function call, not as layers",
    nn.Transformer: "it may run as one fused kernel",
    nn.Bilinear: "a bilinear unit has no single vector of incoming activations",
}


def is_covered(module: nn.Module) -> TypeGuard[WeightLayer]:
    """Whether the units of this kind of layer can be measured."""
    return isinstance(module, nn.Linear | _ConvNd)


def why_uncovered(module: nn.Module) -> str | None:
    """The reason why a layer with units cannot be measured; None where it can, or has no units."""
    kind = next((reason for kind, reason in UNCOVERED.items() if isinstance(module, kind)), None)
    if kind is not None or not is_covered(module):
        return kind
    if is_lazy(module):
        return "its weights have no shape before the model has run once"
    weight = module._parameters.get("weight")
    if weight is not None and (weight.dim() < 2 or hasattr(weight, "full_tensor")):
        return "its weights are sharded over processes, or flattened"
    strange = next((p.dtype for p in module.parameters() if not p.is_floating_point()), None)
    if strange is not None:
        return f"its weights are {strange}, and have no real gradient"
    return None


def is_lazy(module: nn.Module) -> bool:
    """Whether the sizes of a layer are left to its first input."""
    return isinstance(module, LazyModuleMixin) and any(
        is_lazy_parameter(p) for p in module.parameters()
    )


def kind(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a module is, or was derived from."""
    return next(
        kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules.")
    )


def has_own_forward(module: WeightLayer) -> bool:
    """Whether somebody replaced what the layer computes, so that ``weight · input + bias`` is no
    longer certain.
    """
    names = ("forward", "_conv_forward")
    return any(
        name in vars(module)
        or getattr(type(module), name, None) is not getattr(kind(module), name, None)
        for name in names
    )


def unit_count(module: WeightLayer) -> int:
    """The number of units: output features or channels."""
    return _sizes(module)[0]


def input_count(module: WeightLayer) -> int:
    """The number of incoming activations of one unit: a patch of its group, for a convolution."""
    return _sizes(module)[1]


def _sizes(module: WeightLayer) -> tuple[int, int]:
    if is_parametrized(
        module, "weight"
    ):  # a look at the weight computes it, and moves the vectors of spectral_norm
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        return module.out_channels, module.in_channels // module.groups * math.prod(
            module.kernel_size
        )
    weight = module.weight
    units = (
        weight.shape[1] * module.groups if isinstance(module, _ConvTransposeNd) else weight.shape[0]
    )
    return units, weight.numel() // units


def group_count(module: WeightLayer) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def weights(module: WeightLayer, weight: Tensor | None = None) -> Float[Tensor, "units inputs"]:
    """The weights of every unit, in the order of `patches`; or another tensor of the weight's
    shape, a gradient for example.
    """
    weight = module.weight if weight is None else weight
    if isinstance(
        module, _ConvTransposeNd
    ):  # (channels, units of a group, *kernel), group after group
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def as_weight(module: WeightLayer, x: Float[Tensor, "units inputs"]) -> Tensor:
    """A matrix with one row per unit, in the shape of ``module.weight``: the inverse of `weights`."""
    if not isinstance(module, _ConvTransposeNd):
        return x.reshape(module.weight.shape)
    channels, units, *kernel = module.weight.shape
    return (
        x.reshape(module.groups, units, channels // module.groups, *kernel)
        .transpose(1, 2)
        .reshape(module.weight.shape)
    )


def errors(module: WeightLayer, delta: Tensor) -> Errors:
    """Gradients with respect to the layer's output, (passes, batch, …), with positions and units in
    place.
    """
    if isinstance(module, _ConvNd):
        return delta.flatten(3).transpose(2, 3)
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1])


def patches(
    module: WeightLayer, a: Tensor, shape: torch.Size | None = None, reference: Tensor | None = None
) -> Patches:
    """The incoming activations of every position. A view where that is possible, since patches
    repeat their input.

    ``shape`` is that of the net inputs, which only transposed convolutions need: ``output_size=``
    of the call decides it. ``reference``, one number per channel, is subtracted: from the padding
    too, and before the patches repeat it.
    """
    if not isinstance(module, _ConvNd):
        return (a if reference is None else a - reference).reshape(len(a), -1, 1, a.shape[-1])
    dims, stride, unfolded = (
        len(module.kernel_size),
        stride_of_patches(module),
        padded(module, a, shape),
    )
    if reference is not None:
        unfolded = unfolded - reference.view(-1, *[1] * dims)
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, stride, module.dilation, strict=True), start=2
    ):
        unfolded = unfolded.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    if isinstance(module, _ConvTransposeNd):
        unfolded = unfolded.flip(list(range(2 + dims, 2 + 2 * dims)))
    # (batch, channels, *positions, *kernel): a unit's weights are in the order (channel, *kernel).
    # In memory, too, the positions
    # are copied last: their rows are long, the kernel's are three numbers.
    positions = math.prod(unfolded.shape[2 : 2 + dims])
    by_weight = unfolded.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return by_weight.reshape(len(a), module.groups, -1, positions).permute(0, 3, 1, 2)


def channel_means(
    module: WeightLayer, x: Float[Tensor, "groups inputs"]
) -> Float[Tensor, " channels"]:
    """The means over the places of the kernel."""
    return x.reshape(module.in_channels, -1).mean(1) if isinstance(module, _ConvNd) else x[0]


def of_channels(
    module: WeightLayer, x: Float[Tensor, " channels"]
) -> Float[Tensor, "groups inputs"]:
    """The same number at every place of the kernel."""
    return x.repeat_interleave(group_count(module) * input_count(module) // len(x)).view(
        group_count(module), -1
    )


def padded(module: _ConvNd, a: Tensor, shape: torch.Size | None = None) -> Tensor:
    """The map that `patches` are cut from: the input with its padding, or spread out for a
    transposed convolution.
    """
    return _spread(module, a, shape) if isinstance(module, _ConvTransposeNd) else _pad(module, a)


def stride_of_patches(module: _ConvNd) -> tuple[int, ...]:
    """How far apart they are cut."""
    return (1,) * len(module.kernel_size) if isinstance(module, _ConvTransposeNd) else module.stride


def _spread(module: _ConvTransposeNd, a: Tensor, shape: torch.Size | None) -> Tensor:
    """The input with stride − 1 zeros between its places, and so many around it that the kernel
    gets to every output.
    """
    sides: list[int] = []
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        padding, extra = int(module.padding[axis]), module.output_padding[axis]
        places, reach = (a.shape[2 + axis] - 1) * step + 1, dilation * (size - 1)
        outputs = places + reach - 2 * padding + extra if shape is None else shape[2 + axis]
        before = reach - padding  # negative where the padding cuts the first outputs off
        sides = [before, outputs + reach - places - before, *sides]
    spread = a.new_zeros(
        *a.shape[:2],
        *((n - 1) * step + 1 for n, step in zip(a.shape[2:], module.stride, strict=True)),
    )
    spread[(..., *(slice(None, None, step) for step in module.stride))] = a
    return F.pad(spread, sides)


def _pad(module: _ConvNd, a: Tensor) -> Tensor:
    if module.padding == "valid" or module.padding == (0,) * len(module.kernel_size):
        return a
    if module.padding == "same":  # the odd one goes to the end, as in torch
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides: list[int] = [
        side for pair in reversed(pairs) for side in pair
    ]  # the last axis first, as F.pad wants it
    return F.pad(a, sides, mode=mode)


def is_batched(module: WeightLayer, a: Tensor) -> bool:
    """Whether ``a`` has an axis of examples in front."""
    return a.dim() == 2 + len(module.kernel_size) if isinstance(module, _ConvNd) else a.dim() >= 2


def summed_patch(
    module: WeightLayer, a: Tensor, shape: torch.Size | None = None
) -> Float[Tensor, "groups inputs"]:
    """The sum of `patches` over examples and positions, float64. Padding and unfolding are linear:
    the examples go first.
    """
    return patches(module, a.detach().sum(0, keepdim=True, dtype=torch.float64), shape).sum((0, 1))


def summed_output(module: WeightLayer, output: Tensor) -> Float[Tensor, " units"]:
    """The sum of the net inputs over examples and positions, float64."""
    summed = output.detach().sum(0, dtype=torch.float64)
    return (
        summed.flatten(1).sum(1)
        if isinstance(module, _ConvNd)
        else summed.reshape(-1, summed.shape[-1]).sum(0)
    )


def per_unit(module: WeightLayer, x: Float[Tensor, "groups inputs"]) -> Tensor:
    """(inputs,) where all units see the same inputs, else (units, inputs)."""
    return x[0] if len(x) == 1 else x.repeat_interleave(unit_count(module) // len(x), dim=0)


def grouped(module: WeightLayer, units: Tensor) -> list[Tensor]:
    """The given units, split by the group whose inputs they see."""
    size = unit_count(module) // group_count(module)
    return [units[units // size == group] for group in range(group_count(module))]


def dtype_of_sums(a: Tensor) -> torch.dtype:
    """Products are formed in the working precision, half precisions in float32."""
    return torch.promote_types(a.dtype, torch.float32)
