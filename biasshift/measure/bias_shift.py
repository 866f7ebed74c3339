"""The bias shift of an update that really happened: what moved every unit's mean net input, and by
how much.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from biasshift.measure import layer_types
from biasshift.measure.coverage import own_function, refuse
from biasshift.measure.hooks import output_hooks, underlying
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.probe import Probe, Selection, batches, rereadable, weight_layers
from biasshift.measure.sandbox import undisturbed
from biasshift.theory import shift_parts


@dataclass(frozen=True)
class BiasShift:
    """One layer's change of the mean net input, unit by unit; ``total`` is measured and equals the
    sum of the parts.
    """

    total: Float[Tensor, " units"]
    own: Float[Tensor, " units"]  # this unit's weights moved
    incoming: Float[Tensor, " units"]  # the layers below moved: the bias shift it inherits
    second_order: Float[Tensor, " units"]

    @property
    def inherited_share(self) -> float:
        """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the units."""
        own, incoming, second = (
            x.abs().sum().item() for x in (self.own, self.incoming, self.second_order)
        )
        return incoming / (own + incoming + second) if own + incoming + second > 0 else float("nan")


class Shifts(Mapping[str, BiasShift]):
    """The bias shift of every layer, readable after the block of `bias_shift` has ended."""

    def __init__(self) -> None:
        self._layers: dict[str, BiasShift] | None = None

    def _measured(self) -> dict[str, BiasShift]:
        if self._layers is None:
            raise RuntimeError(
                "The bias shift is measured when the block of bias_shift ends: read it after the "
                "block."
            )
        return self._layers

    def __getitem__(self, layer: str) -> BiasShift:
        return self._measured()[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured())

    def __len__(self) -> int:
        return len(self._measured())


@contextmanager
def bias_shift(
    model: nn.Module, x: Probe, *, layers: Selection = None, batch_size: int | None = None
) -> Iterator[Shifts]:
    """Measures, before and after the block, how the update inside it moves the mean net input of
    every unit on the probe.

    ``Δ(mean net) = (Δwᵀμ + Δw₀) + wᵀΔμ + ΔwᵀΔμ``: own, incoming, second order. An identity for any
    update whatsoever, so it tests the measurement before anything is claimed about trends. The
    model is measured in eval mode and left as found.

    Args:
        x: a tensor of examples, or an iterable of batches x or (x, y).
        layers: names, or a predicate ``(name, module) → bool``.

    Raises:
        ValueError: for a layer that cannot be measured.
        RuntimeError: when the result is read inside the block.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> with bias_shift(model, torch.ones(4, 2)) as shift:
    ...     _ = model[0].bias.data.add_(0.5)
    >>> shift["0"].total, shift["0"].incoming
    (tensor([0.5000, 0.5000, 0.5000]), tensor([0., 0., 0.]))

    Source: the exact counterpart of the bias shift of section 3 of the ELU paper.
    """
    probe = rereadable(x)
    shifts = Shifts()
    before = net_means(model, probe, layers, batch_size)
    yield shifts
    shifts._layers = compare(before, net_means(model, probe, layers, batch_size))


@dataclass(frozen=True)
class NetMeans:
    """One layer at one moment: weights, mean incoming activations, mean net input. float64."""

    w: Float[Tensor, "units inputs"]
    w0: Float[Tensor, " units"]
    mean: Tensor  # (inputs,), or (units, inputs) for groups
    net: Float[Tensor, " units"]
    dtype: torch.dtype
    positions: int  # that the means are over


def net_means(
    model: nn.Module, x: Probe, layers: Selection = None, batch_size: int | None = None
) -> dict[str, NetMeans]:
    """Weights, mean incoming activations and mean net inputs of every layer on a probe, in eval
    mode.
    """
    model = underlying(model)
    modules = weight_layers(model, layers)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if why := own_function(modules[name], a, output):
            refuse(modules, {name: why})
        positions = output.numel() // layer_types.unit_count(modules[name])
        incoming = layer_types.summed_patch(modules[name], a, output.shape)
        old = sums.get(name, (0.0, 0.0, 0))
        sums[name] = (
            old[0] + incoming,
            old[1] + layer_types.summed_output(modules[name], output),
            old[2] + positions,
        )
        dtypes[name] = output.dtype

    with undisturbed(model, evaluate=True), output_hooks(modules, record, raw=True):
        for a, _ in batches(model, x, None, batch_size):
            model(a)
        return {
            name: _net_means(modules[name], *sums[name], dtypes[name])
            for name in modules
            if name in sums
        }


def _net_means(
    module: WeightLayer, incoming: Tensor, net: Tensor, positions: int, dtype: torch.dtype
) -> NetMeans:
    w = layer_types.weights(module).detach().double().clone()
    w0 = torch.zeros_like(net) if module.bias is None else module.bias.detach().double().clone()
    return NetMeans(
        w, w0, layer_types.per_unit(module, incoming / positions), net / positions, dtype, positions
    )


def compare(before: Mapping[str, NetMeans], after: Mapping[str, NetMeans]) -> dict[str, BiasShift]:
    """The bias shift of every layer between two moments."""
    shifts = {}
    for name, old in before.items():
        new = after[name]
        parts = shift_parts(old.w, new.w - old.w, new.w0 - old.w0, old.mean, new.mean - old.mean)
        shifts[name] = BiasShift(*(part.to(old.dtype) for part in (new.net - old.net, *parts)))
    return shifts


# -- the gradient that a step uses -----------------------------------------------------------------


def used_gradients(
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, WeightLayer],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What ``.grad`` holds as a step begins: by layer (units, inputs) and (units,), None for a bias
    that is not trained. float64.

    Whatever filled it: several backward passes, an average over processes, clipping. The scale of a
    gradient scaler that leaves the division to the optimizer is divided out, and with ``maximize``
    the sign turned. A layer is left out where its weight has no gradient or is not the optimizer's
    (frozen, parametrized, a copy in another precision). So are all layers when the step makes its
    gradients itself, by a closure, or takes the scaler as an argument.

    Args:
        args, kwargs: of ``step``, the optimizer first, as a hook before it gets them.
    """
    given = dict(kwargs or {})
    if (
        any(x is not None for x in args[1:])
        or given.get("closure") is not None
        or "grad_scaler" in given
    ):
        return {}
    factors = {
        p: -1.0 if group.get("maximize") else 1.0
        for group in optimizer.param_groups
        for p in group["params"]
    }
    scale = getattr(optimizer, "grad_scale", None)
    found = {}
    for name, module in modules.items():
        own = module._parameters  # a look at a parametrized weight would compute it
        g = _used(own.get("weight"), factors, scale)
        if g is not None and "bias" in own:
            found[name] = layer_types.weights(module, g), _used(own["bias"], factors, scale)
    return found


def unit_weights(module: WeightLayer) -> tuple[Tensor, Tensor | None]:
    """The weights (units, inputs) and biases of every unit, copied to float64."""
    w0 = None if module.bias is None else module.bias.detach().double().clone()
    return layer_types.weights(module).detach().double().clone(), w0


def _used(p: Tensor | None, factors: Mapping[Tensor, float], scale: Tensor | None) -> Tensor | None:
    whole, place = (p, None) if p is None or p in factors else _stack_of(p, factors)
    if whole is None or whole.grad is None:
        return None
    grad = whole.grad.detach()
    grad = (grad if grad.layout == torch.strided else grad.to_dense()).double() * factors[whole]
    grad = grad if place is None else grad[place]
    return grad if scale is None else grad / scale.to(grad.device).double()


def _stack_of(p: Tensor, stacks: Iterable[Tensor]) -> tuple[Tensor | None, int]:
    """The parameter that ``p`` is a slice of, and which: the networks of an ensemble are views into
    what its optimizer trains.
    """
    for stack in stacks:
        if (
            type(stack) is nn.Parameter
            and stack.shape[1:] == p.shape
            and stack.stride()[1:] == p.stride()
            and stack.numel()
        ):
            place, rest = divmod(
                int(p.storage_offset() - stack.storage_offset()), max(int(stack.stride(0)), 1)
            )
            one_storage = stack.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
            if one_storage and rest == 0 and 0 <= place < len(stack):
                return stack, place
    return None, 0
