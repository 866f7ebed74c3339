"""What a unit is, layer kind by layer kind: its incoming activations, its errors, its weights.

A linear layer has one position per leading index behind the examples; a convolution one per place of its kernel, where the
incoming activations are the patch under the kernel (zeros of the padding included). Grouped convolutions have one set of
incoming activations per group.
"""

import math
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

WeightLayer = nn.Linear | _ConvNd
Patches = Float[Tensor, "batch positions groups inputs"]
Errors = Float[Tensor, "*passes batch positions units"]

UNCOVERED: dict[type[nn.Module], str] = {
    _ConvTransposeNd: "transposed convolutions are not covered yet",
    nn.RNNBase: "its net inputs are inside a fused kernel",
    nn.RNNCellBase: "its net inputs are inside a fused kernel",
    nn.MultiheadAttention: "its projections are applied inside one function call, not as layers",
    nn.Transformer: "it may run as one fused kernel",
    nn.Bilinear: "a bilinear unit has no single vector of incoming activations",
}


def is_covered(module: nn.Module) -> TypeGuard[WeightLayer]:
    """Whether the units of this layer can be measured."""
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd))


def why_uncovered(module: nn.Module) -> str | None:
    """The reason why a layer with units cannot be measured; None where it can, or has no units."""
    return next((reason for kind, reason in UNCOVERED.items() if isinstance(module, kind)), None)


def unit_count(module: WeightLayer) -> int:
    """The number of units: output features or channels."""
    return module.weight.shape[0]


def input_count(module: WeightLayer) -> int:
    """The number of incoming activations of one unit: a patch of its group, for a convolution."""
    return module.weight[0].numel()


def group_count(module: WeightLayer) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def weights(module: WeightLayer) -> Float[Tensor, "units inputs"]:
    """The weights of every unit, in the order of `patches`."""
    return module.weight.flatten(1)


def errors(module: WeightLayer, delta: Tensor) -> Errors:
    """Gradients with respect to the layer's output, (passes, batch, …), with positions and units in place."""
    if isinstance(module, _ConvNd):
        return delta.flatten(3).transpose(2, 3)
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1])


def patches(module: WeightLayer, a: Tensor) -> Patches:
    """The incoming activations of every position. A view where that is possible, since patches repeat their input."""
    if not isinstance(module, _ConvNd):
        return a.reshape(len(a), -1, 1, a.shape[-1])
    groups, dims = module.groups, len(module.kernel_size)
    unfolded = _pad(module, a)
    for axis, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2):
        unfolded = unfolded.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (batch, *positions, channels, *kernel): a unit's weights in their own order
    unfolded = unfolded.movedim(1, 1 + dims)
    positions = math.prod(unfolded.shape[1 : 1 + dims])
    return unfolded.reshape(len(a), positions, groups, -1)


def _pad(module: _ConvNd, a: Tensor) -> Tensor:
    if module.padding == "valid" or module.padding == (0,) * len(module.kernel_size):
        return a
    if module.padding == "same":  # the odd one goes to the end, as in torch
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides: list[int] = [side for pair in reversed(pairs) for side in pair]  # the last axis first, as F.pad wants it
    return F.pad(a, sides, mode=mode)


def is_batched(module: WeightLayer, a: Tensor) -> bool:
    """Whether ``a`` has an axis of examples in front."""
    return a.dim() == 2 + len(module.kernel_size) if isinstance(module, _ConvNd) else a.dim() >= 2


def summed_patch(module: WeightLayer, a: Tensor) -> Float[Tensor, "groups inputs"]:
    """The sum of `patches` over examples and positions, float64. Padding and unfolding are linear: the examples go first."""
    return patches(module, a.detach().sum(0, keepdim=True, dtype=torch.float64)).sum((0, 1))


def summed_output(module: WeightLayer, output: Tensor) -> Float[Tensor, " units"]:
    """The sum of the net inputs over examples and positions, float64."""
    summed = output.detach().sum(0, dtype=torch.float64)
    return summed.flatten(1).sum(1) if isinstance(module, _ConvNd) else summed.reshape(-1, summed.shape[-1]).sum(0)


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
