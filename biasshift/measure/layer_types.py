"""Layers with units: the incoming activations, the errors and the weights of every layer type.

A linear layer has one position per leading index behind the examples. A convolution has one per
place of its kernel, where the incoming activations are the patch under the kernel, zeros of the
padding included. Grouped convolutions have one set of incoming activations per group. A position
of a transposed convolution is a place of its *output*. Its patch is cut from the input spread out
with zeros in between, and lies under the flipped kernel.

Attention and recurrent modules are `composites`. The linear layers inside of them, each a
`LinearPart`, have names behind that of their owner. The weight of a `Conv1D` is (inputs, units).

The weights of a unit are in the order (channel of the group, then the places of the kernel), as in
the ``weight`` of a convolution. `weights` reads them as (units, inputs), and `as_weight` writes
such a matrix, for example an update, back.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy as is_lazy_parameter
from torch.nn.utils.parametrize import is_parametrized

from biasshift.measure import composites
from biasshift.measure.parts import LinearPart


class _KnownByAttributes(type):
    def __instancecheck__(cls, module: Any) -> bool:
        named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
        return (
            named
            and isinstance(module, nn.Module)
            and not isinstance(module, nn.Linear | _ConvNd)
            and isinstance(vars(module).get("nf"), int)
        )


class Conv1D(nn.Module, metaclass=_KnownByAttributes):
    """The linear layer of GPT-2 in the package transformers, ``a · weight + bias``.

    It is known by its name and its attribute ``nf``, without an import of that package. Like other
    forwards of somebody's own, its forward is tested on an example.
    """

    nf: int
    weight: Tensor
    bias: Tensor


WeightLayer = nn.Linear | _ConvNd | Conv1D
LINEAR = (nn.Linear, Conv1D)
Selection = Iterable[str] | Callable[[str, nn.Module], bool] | None
Patches = Float[Tensor, "batch positions groups inputs"]
Errors = Float[Tensor, "*passes batch positions units"]

UNCOVERED: dict[type[nn.Module], str] = {
    nn.Bilinear: "a bilinear unit has no single vector of incoming activations",
}


# -- which layers are measured ---------------------------------------------------------------------


def is_covered(module: nn.Module) -> TypeGuard[WeightLayer]:
    """Tells whether a module is of a layer type whose units can be measured."""
    return isinstance(module, WeightLayer)


def why_uncovered(module: nn.Module) -> str | None:
    """Returns why a layer with units cannot be measured.

    Returns:
        A clause that follows "cannot be measured:", or None where the layer can be measured or has
        no units.
    """
    why = next((why for known, why in UNCOVERED.items() if isinstance(module, known)), None)
    why = why or composites.why_whole(module)
    if why is None and is_quantized(module):
        why = "its weights are quantized, and have no gradient"
    if why is not None or not is_covered(module):
        return why
    if is_lazy(module):
        return "its weights have no shape before the model has run once"
    weight = parameter(module, "weight")
    if weight is not None and (weight.dim() < 2 or hasattr(weight, "full_tensor")):
        return "its weights are sharded over processes, or flattened"
    own = (parameter(module, key) for key in ("weight", "bias"))
    known = [p for p in (*own, *module.parameters()) if p is not None]
    dtype = next((p.dtype for p in known if not p.is_floating_point()), None)
    if dtype is not None:
        return f"its weights are {dtype}, and have no real gradient"
    kind = next((type(p) for p in known if _is_of_another_kind(p)), None)
    return f"its weights are a {kind.__name__}, not a plain tensor" if kind is not None else None


def is_quantized(module: nn.Module) -> bool:
    """Tells whether a module is one of PyTorch's quantized layers with units.

    Their weights are packed, and are no parameters. No gradient goes through them.
    """
    packages = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
    own = {*vars(module), *module._modules}
    return (
        any(base.__module__.startswith(packages) for base in type(module).__mro__)
        and not own.isdisjoint(("_packed_params", "_all_weight_values", "_packed_weight_ih"))
        and "Embedding" not in type(module).__name__
    )


def is_quantizer(module: nn.Module) -> bool:
    """Tells whether a module is PyTorch's step from floating to quantized numbers."""
    return type(module).__name__ == "Quantize" and type(module).__module__.startswith("torch.ao.nn")


def _is_of_another_kind(p: Tensor) -> bool:
    """A subclass that computes in its own way, as the quantized tensors of torchao do."""
    own = getattr(type(p), "__torch_dispatch__", None)
    return own is not getattr(Tensor, "__torch_dispatch__", None)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of a model by name, with the parts of a composite one after their owner.

    >>> list(named_modules(nn.Sequential(nn.GRU(2, 3), nn.ReLU())))
    ['', '0', '0.ih_l0', '0.hh_l0', '1']
    """
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        named[name] = module
        for part, layer in composites.parts(module).items():
            named[f"{name}.{part}" if name else part] = layer
    return named


def parameter(module: nn.Module, key: str) -> Tensor | None:
    """Returns the parameter that a layer's ``"weight"`` or ``"bias"`` is, or is rows of.

    None where it has none, or where it is computed, by a parametrization or a hook.
    """
    return module.parameter(key) if isinstance(module, LinearPart) else module._parameters.get(key)


def rows(module: nn.Module, whole: Tensor) -> Tensor:
    """Returns a layer's share of a tensor that is shaped like its `parameter`."""
    return module.rows(whole) if isinstance(module, LinearPart) else whole


def row_range(module: nn.Module, whole: Tensor) -> tuple[int, int]:
    """Returns where the `rows` of a layer begin and end."""
    if not isinstance(module, LinearPart) or len(whole) == module.out_features:
        return 0, len(whole)
    return module.first, module.first + module.out_features


def weight_layers(
    model: nn.Module, select: Selection = None, required: bool = True
) -> dict[str, WeightLayer]:
    """Returns the layers whose units can be measured, by PyTorch's module names.

    Args:
        select: names, a predicate ``(name, module) → bool``, or None for all layers.
        required: whether a model without such a layer is an error.

    Raises:
        ValueError: for an unknown name, or a layer that cannot be measured.

    >>> list(weight_layers(nn.Sequential(nn.Linear(2, 3), nn.ELU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    named = named_modules(model)
    measurable = [name for name, module in named.items() if is_covered(module)]
    chosen = selected_modules(model, named, select, "layer", measurable)
    by_name = select is not None and not callable(select)
    for name, module in chosen.items():
        why = why_uncovered(module)
        if why is None and by_name and not is_covered(module):
            why = _why_no_units(name, module)
        if why:
            raise ValueError(
                f"Layer '{name}' ({type(module).__name__}) cannot be measured: {why}. Leave it out "
                "with layers=."
            )
    covered = {name: module for name, module in chosen.items() if is_covered(module)}
    if not covered and required:
        raise ValueError(
            "The model has no layer that can be measured: nn.Linear, nn.Conv1d/2d/3d or "
            "nn.ConvTranspose1d/2d/3d, attention or a recurrent layer, called as modules."
        )
    return covered


def _why_no_units(name: str, module: nn.Module) -> str:
    parts = composites.parts(module)
    if not parts:
        return "it has no units with weights"
    names = (f"{name}.{part}" if name else part for part in composites.layer_names(module))
    return f"name the layers inside of it, {', '.join(map(repr, names))}"


def selected_modules(
    model: nn.Module,
    candidates: dict[str, nn.Module],
    select: Selection,
    noun: str,
    choices: Iterable[str],
) -> dict[str, nn.Module]:
    """Returns the candidates that are selected by name or by a predicate.

    Args:
        candidates: modules of the model, by name.
        noun: what an error message calls a candidate.
        choices: the names that the message offers.

    Raises:
        ValueError: for a name that is not among the candidates. The message gives the name under
            which PyTorch lists the module, where the model holds it twice.
    """
    if select is None:
        return candidates
    if callable(select):
        return {name: module for name, module in candidates.items() if select(name, module)}
    names = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in names if name not in candidates]
    if unknown:
        first_names = {module: name for name, module in model.named_modules()}
        aliases = "; ".join(
            f"'{name}' is '{first_names[module]}'"
            for name, module in model.named_modules(remove_duplicate=False)
            if name in unknown and first_names[module] != name
        )
        hint = f" ({aliases} under another name)" if aliases else ""
        raise ValueError(
            f"The model has no {noun} {', '.join(map(repr, unknown))}{hint}. Choose from "
            f"{', '.join(map(repr, choices))}."
        )
    return {name: candidates[name] for name in names}


def is_lazy(module: nn.Module) -> bool:
    """Tells whether the sizes of a layer are left to its first input."""
    return isinstance(module, LazyModuleMixin) and any(map(is_lazy_parameter, module.parameters()))


def torch_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class of ``torch.nn`` that a module is an instance of, or derived from."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules."))


def has_own_forward(module: WeightLayer) -> bool:
    """Tells whether a layer's forward was replaced, by a subclass or on the object.

    What such a layer returns may be something else than ``weight · input + bias``, which
    `independence.why_not_affine` tests on examples.
    """
    names = ("forward", "_conv_forward")
    return any(
        name in vars(module)
        or getattr(type(module), name, None) is not getattr(torch_class(module), name, None)
        for name in names
    )


# -- sizes -----------------------------------------------------------------------------------------


def unit_count(module: WeightLayer) -> int:
    """Returns the number of units: output features of a linear layer, channels of a convolution.

    A parametrized weight is not computed for it.
    """
    return _sizes(module)[0]


def input_count(module: WeightLayer) -> int:
    """Returns the number of incoming activations of one unit.

    For a convolution these are the numbers in a patch of its group.

    >>> unit_count(nn.Conv2d(4, 6, 3, groups=2)), input_count(nn.Conv2d(4, 6, 3, groups=2))
    (6, 18)
    """
    return _sizes(module)[1]


def _sizes(module: WeightLayer) -> tuple[int, int]:
    # Reading a parametrized weight computes it, and moves the vectors of spectral_norm.
    if isinstance(module, LinearPart):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        inputs = vars(module).get("nx")
        return module.nf, len(module.weight) if inputs is None else inputs
    if is_parametrized(module, "weight"):
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        places = math.prod(module.kernel_size)
        return module.out_channels, module.in_channels // module.groups * places
    weight = module.weight
    units = len(weight)
    if isinstance(module, _ConvTransposeNd):
        units = weight.shape[1] * module.groups
    return units, weight.numel() // units


def group_count(module: WeightLayer) -> int:
    """Returns the number of groups of units; the units of a group see the same inputs."""
    return module.groups if isinstance(module, _ConvNd) else 1


def grouped(module: WeightLayer, units: Tensor) -> list[Tensor]:
    """Splits indices of units by group: one tensor of indices for each, which may be empty.

    >>> grouped(nn.Conv2d(4, 6, 3, groups=2), torch.tensor([0, 2, 3]))
    [tensor([0, 2]), tensor([3])]
    """
    size = unit_count(module) // group_count(module)
    return [units[units // size == group] for group in range(group_count(module))]


# -- weights and errors ----------------------------------------------------------------------------


def weights(module: WeightLayer, weight: Tensor | None = None) -> Float[Tensor, "units inputs"]:
    """Returns the weights of every unit, in the order of `patches`.

    Args:
        weight: another tensor of the weight's shape to be read like it, for example a gradient.

    >>> weights(nn.Conv2d(4, 6, 3, groups=2)).shape
    torch.Size([6, 18])
    """
    weight = module.weight if weight is None else weight
    if isinstance(module, _ConvTransposeNd):
        # (channels, units of a group, *kernel), group after group
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def as_weight(module: WeightLayer, x: Float[Tensor, "units inputs"]) -> Tensor:
    """Returns a matrix with one row per unit in the shape of ``module.weight``.

    It is the inverse of `weights`: ``as_weight(module, weights(module))`` equals the weight. An
    update that is computed unit by unit gets back to the parameter in this way.
    """
    if isinstance(module, Conv1D):
        return x.T
    if not isinstance(module, _ConvTransposeNd):
        return x.reshape(module.weight.shape)
    channels, units, *kernel = module.weight.shape
    by_group = x.reshape(module.groups, units, channels // module.groups, *kernel)
    return by_group.transpose(1, 2).reshape(module.weight.shape)


def errors(module: WeightLayer, delta: Tensor) -> Errors:
    """Returns gradients with respect to a layer's output with their axes in order.

    Args:
        delta: (passes, batch, …), with the remaining axes as the layer returns them.

    Returns:
        (passes, batch, positions, units), where possible as a view.
    """
    if isinstance(module, _ConvNd):
        return delta.flatten(3).transpose(2, 3)
    return delta.reshape(*delta.shape[:2], -1, delta.shape[-1])


# -- incoming activations --------------------------------------------------------------------------


def patches(
    module: WeightLayer, a: Tensor, shape: torch.Size | None = None, reference: Tensor | None = None
) -> Patches:
    """Returns the incoming activations of every position.

    The result is a view where that is possible, since patches repeat their input.

    Args:
        a: the input of the layer, examples first.
        shape: that of the net inputs. Only transposed convolutions need it, whose ``output_size=``
            decides it call by call.
        reference: one number per channel, which is subtracted from the padding too, before the
            patches repeat it.

    >>> patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))[0, :, 0]
    tensor([[1., 2.],
            [2., 3.]])
    """
    if not isinstance(module, _ConvNd):
        return (a if reference is None else a - reference).reshape(len(a), -1, 1, a.shape[-1])
    dims, unfolded = len(module.kernel_size), padded(module, a, shape)
    if reference is not None:
        unfolded = unfolded - reference.view(-1, *[1] * dims)
    steps = zip(module.kernel_size, patch_stride(module), module.dilation, strict=True)
    for axis, (size, step, dilation) in enumerate(steps, start=2):
        unfolded = unfolded.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    if isinstance(module, _ConvTransposeNd):
        unfolded = unfolded.flip(list(range(2 + dims, 2 + 2 * dims)))
    # (batch, channels, *positions, *kernel): a unit's weights are in the order (channel, *kernel).
    # In memory, too, the positions are copied last: their rows are long, the kernel's are three
    # numbers.
    positions = math.prod(unfolded.shape[2 : 2 + dims])
    by_weight = unfolded.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return by_weight.reshape(len(a), module.groups, -1, positions).permute(0, 3, 1, 2)


def padded(module: _ConvNd, a: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Returns the map that `patches` are cut from.

    It is the input with its padding; for a transposed convolution the input spread out with zeros.

    Args:
        shape: that of the net inputs, which only transposed convolutions need.
    """
    if isinstance(module, _ConvTransposeNd):
        return _spread(module, a, shape)
    if module.padding == "valid" or module.padding == (0,) * len(module.kernel_size):
        return a
    if module.padding == "same":  # the odd one goes to the end, as in torch
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in module.padding]
    sides = [side for pair in reversed(pairs) for side in pair]  # the last axis first, for F.pad
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(a, sides, mode=mode)


def _spread(module: _ConvTransposeNd, a: Tensor, shape: torch.Size | None) -> Tensor:
    """Zeros between the places, stride − 1 of them, and around until the kernel gets everywhere."""
    sides: list[int] = []
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        padding, extra = int(module.padding[axis]), module.output_padding[axis]
        places, reach = (a.shape[2 + axis] - 1) * step + 1, dilation * (size - 1)
        outputs = places + reach - 2 * padding + extra if shape is None else shape[2 + axis]
        before = reach - padding  # negative where the padding cuts the first outputs off
        sides = [before, outputs + reach - places - before, *sides]
    sizes = [(n - 1) * step + 1 for n, step in zip(a.shape[2:], module.stride, strict=True)]
    spread = a.new_zeros(*a.shape[:2], *sizes)
    spread[(..., *(slice(None, None, step) for step in module.stride))] = a
    return F.pad(spread, sides)


def patch_stride(module: _ConvNd) -> tuple[int, ...]:
    """Returns how far apart `patches` are cut from the `padded` map, axis by axis."""
    return (1,) * len(module.kernel_size) if isinstance(module, _ConvTransposeNd) else module.stride


def is_batched(module: WeightLayer, a: Tensor) -> bool:
    """Tells whether ``a`` has an axis of examples in front."""
    return a.dim() == 2 + len(module.kernel_size) if isinstance(module, _ConvNd) else a.dim() >= 2


# -- sums and means --------------------------------------------------------------------------------


def summed_patch(
    module: WeightLayer, a: Tensor, shape: torch.Size | None = None
) -> Float[Tensor, "groups inputs"]:
    """Returns the sum of `patches` over examples and positions, float64.

    Padding and unfolding are linear, so the examples are summed first.
    """
    return patches(module, a.detach().sum(0, keepdim=True, dtype=torch.float64), shape).sum((0, 1))


def summed_output(module: WeightLayer, output: Tensor) -> Float[Tensor, " units"]:
    """Returns the sum of the net inputs over examples and positions, float64.

    Examples are summed first, in the order in which `summed_patch` sums them.
    """
    summed = output.detach().sum(0, dtype=torch.float64)
    if isinstance(module, _ConvNd):
        return summed.flatten(1).sum(1)
    return summed.reshape(-1, summed.shape[-1]).sum(0)


def channel_means(
    module: WeightLayer, x: Float[Tensor, "groups inputs"]
) -> Float[Tensor, " channels"]:
    """Returns the mean over the places of the kernel, channel by channel."""
    return x.reshape(module.in_channels, -1).mean(1) if isinstance(module, _ConvNd) else x[0]


def repeat_channels(
    module: WeightLayer, x: Float[Tensor, " channels"]
) -> Float[Tensor, "groups inputs"]:
    """Returns inputs that hold the number of their channel at every place of the kernel."""
    groups = group_count(module)
    return x.repeat_interleave(groups * input_count(module) // len(x)).view(groups, -1)


def per_unit(module: WeightLayer, x: Float[Tensor, "groups inputs"]) -> Tensor:
    """Returns (inputs,) where all units see the same inputs, and (units, inputs) for groups."""
    return x[0] if len(x) == 1 else x.repeat_interleave(unit_count(module) // len(x), dim=0)


def dtype_of_sums(a: Tensor) -> torch.dtype:
    """Returns the dtype that products are formed in: the tensor's own, but at least float32.

    >>> dtype_of_sums(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(a.dtype, torch.float32)
