"""The bias shift of an update that really happened, measured before and after it on a probe.

It is the change of every unit's mean net input, in the parts that the unit's own weights and the
layers below have caused.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from biasshift import display
from biasshift.measure import layer_types
from biasshift.measure.coverage import are_named, refuse, selected_layers, warn_of_left_out
from biasshift.measure.hooks import call_hooks, underlying
from biasshift.measure.independence import Reasons, why_not_affine
from biasshift.measure.layer_types import Selection, WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.probe import InputNames, Probe, batches, rereadable
from biasshift.measure.sandbox import forward, undisturbed
from biasshift.theory import shift_parts

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("total", "own", "incoming", "second_order")


@dataclass(frozen=True, repr=False)
class BiasShift:
    """One layer's change of the mean net input, unit by unit, in the layer's dtype.

    ``total`` is measured, and equals the sum of the three parts up to rounding: the unit's own
    update, the bias shift that comes in, and the product of both.
    """

    total: Float[Tensor, " units"]
    own: Float[Tensor, " units"]  # this unit's weights moved
    incoming: Float[Tensor, " units"]  # the layers below moved: the bias shift it inherits
    second_order: Float[Tensor, " units"]

    @property
    def inherited_share(self) -> float:
        """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the units."""
        parts = (self.own, self.incoming, self.second_order)
        own, incoming, second = (x.abs().sum().item() for x in parts)
        return incoming / (own + incoming + second) if own + incoming + second > 0 else float("nan")

    def table(self) -> "pd.DataFrame":
        """Returns one row per unit, with its number and the four parts as columns."""
        return display.unit_table({name: getattr(self, name) for name in PARTS})

    def __repr__(self) -> str:
        return f"BiasShift({len(self.total)} units, {_sizes(self)})"

    def _repr_html_(self) -> str:
        return display.page(f"{len(self.total)} units", {"bias shift": _cells(self)})


def _cells(shift: BiasShift) -> dict[str, str]:
    means = {name: f"{getattr(shift, name).abs().mean().item():.3g}" for name in PARTS}
    return {f"mean |{name.replace('_', ' ')}|": size for name, size in means.items()} | {
        "inherited": f"{shift.inherited_share:.0%}"
    }


def _sizes(shift: BiasShift) -> str:
    return ", ".join(f"{name} {value}" for name, value in _cells(shift).items())


class Shifts(Mapping[str, BiasShift]):
    """The bias shift of every layer, by module name: a mapping to `BiasShift`.

    It can be read when the block of `bias_shift` has ended. Inside the block reading it raises
    RuntimeError, since the update has not been measured yet.
    """

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

    def table(self) -> "pd.DataFrame":
        """Returns one row per layer and unit: ``layer``, ``unit``, and the columns of a layer's.

        Raises:
            RuntimeError: inside the block.
        """
        import pandas as pd

        none = pd.DataFrame(columns=["layer", "unit", *PARTS])
        tables = [shift.table().assign(layer=name) for name, shift in self.items()]
        return (
            pd.concat(tables, ignore_index=True).reindex(columns=none.columns) if tables else none
        )

    def __repr__(self) -> str:
        if self._layers is None:
            return "Shifts(measured when the block ends)"
        layers = ", ".join(f"'{name}': {_sizes(shift)}" for name, shift in self.items())
        return f"Shifts({len(self)} layers: {layers})" if layers else "Shifts(0 layers)"

    def _repr_html_(self) -> str:
        if self._layers is None:
            return display.page(repr(self), {})
        return display.page(
            f"{len(self)} layers", {name: _cells(shift) for name, shift in self.items()}
        )


@contextmanager
def bias_shift(
    model: nn.Module,
    x: Probe,
    *,
    layers: Selection = None,
    batch_size: int | None = None,
    inputs: InputNames = None,
    uncovered: str = "skip",
    skip: Selection = None,
) -> Iterator[Shifts]:
    """Measures how the update inside the block moves the mean net input of every unit.

    ``Δ(mean net) = (Δwᵀμ + Δw₀) + wᵀΔμ + ΔwᵀΔμ``: own, incoming, second order. This is an identity
    for any update whatsoever, so it tests the measurement before anything is claimed about trends.
    The model is measured in eval mode, before and after the block, and left as found.

    Args:
        x: a tensor of examples, a dict of the model's arguments, or an iterable of batches x,
            (x, y) or dicts.
        layers: names, or a predicate ``(name, module) → bool``.
        batch_size: examples per forward pass, for a probe that does not fit at once.
        inputs, uncovered, skip: as in `unit_fisher`.

    Raises:
        ValueError: for a named layer that cannot be measured.
        RuntimeError: when the result is read inside the block.

    Warns:
        UncoveredWarning: where layers are left out.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> with bias_shift(model, torch.ones(4, 2)) as shift:
    ...     _ = model[0].bias.data.add_(0.5)
    >>> shift["0"].total, shift["0"].incoming
    (tensor([0.5000, 0.5000, 0.5000]), tensor([0., 0., 0.]))

    Source: the exact counterpart of the bias shift of section 3 of the ELU paper.
    """
    probe = rereadable(x, inputs)
    options = Options(
        layers=layers, batch_size=batch_size, inputs=inputs, uncovered=uncovered, skip=skip
    )
    shifts = Shifts()
    before, left_out = net_means(model, probe, options)
    warn_of_left_out(underlying(model), left_out, stacklevel=4)
    yield shifts
    after, since = net_means(model, probe, options)
    lost = {name: why for name, why in since.items() if name in before}
    warn_of_left_out(underlying(model), lost, stacklevel=4)
    shifts._layers = compare(before, after)


@dataclass(frozen=True)
class NetMeans:
    """One layer at one moment: weights, mean incoming activations, mean net inputs, in float64."""

    w: Float[Tensor, "units inputs"]
    w0: Float[Tensor, " units"]
    mean: Tensor  # (inputs,), or (units, inputs) for groups
    net: Float[Tensor, " units"]
    dtype: torch.dtype
    positions: int  # that the means are over


def net_means(model: nn.Module, x: Probe, options: Options) -> tuple[dict[str, NetMeans], Reasons]:
    """Returns weights, mean incoming activations and mean net inputs of every layer, in eval mode.

    Layers that the model does not call on the probe are not among them.

    Returns:
        The means by layer, and the reasons for the layers that are left out.

    Raises:
        ValueError: for a layer that cannot be measured, where it was named or nothing may be left
            out.
    """
    model = underlying(model)
    modules, left_out = selected_layers(model, options, may_be_tied=True)
    sums: dict[str, tuple[Tensor, Tensor, int, torch.dtype]] = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        layer, a, output = modules[name], a.detach(), output.detach()
        if why := why_not_affine(layer, a, output):
            if are_named(options.layers) or options.uncovered == "raise":
                refuse(modules, {name: why})
            left_out[name] = why
        if name in left_out:
            return
        incoming, net, positions, _ = sums.get(name, (0.0, 0.0, 0, None))
        sums[name] = (
            incoming + layer_types.summed_patch(layer, a, output.shape),
            net + layer_types.summed_output(layer, output),
            positions + output.numel() // layer_types.unit_count(layer),
            output.dtype,
        )

    with undisturbed(model, evaluate=True), call_hooks(modules, record):
        for batch in batches(model, x, None, options.batch_size, inputs=options.inputs):
            before = dict(sums)
            forward(model, batch.x, lambda before=before: (sums.clear(), sums.update(before)))
        means = {}
        for name in (name for name in modules if name in sums and name not in left_out):
            incoming, net, positions, dtype = sums[name]
            w, w0 = unit_weights(modules[name])
            w0 = torch.zeros_like(net) if w0 is None else w0
            mean = layer_types.per_unit(modules[name], incoming / positions)
            means[name] = NetMeans(w, w0, mean, net / positions, dtype, positions)
        if not means:
            refuse(modules, {name: why for name, why in left_out.items() if name in modules})
        return means, left_out


def compare(before: Mapping[str, NetMeans], after: Mapping[str, NetMeans]) -> dict[str, BiasShift]:
    """Returns the bias shift of every layer between two moments.

    Args:
        before, after: on the same probe; `net_means` measures them. Layers that are not in both
            have no shift.

    Returns:
        Differences of float64 means, in the layer's dtype.
    """
    shifts = {}
    for name in (name for name in before if name in after):
        old, new = before[name], after[name]
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
    """Returns the gradients that ``.grad`` holds as a step begins, by layer, in float64.

    Whatever filled it: several backward passes, an average over processes, clipping. The scale of a
    gradient scaler that leaves the division to the optimizer is divided out, and with ``maximize``
    the sign is turned. A layer is left out where its weight has no gradient or is not the
    optimizer's (frozen, parametrized, a copy in another precision). So are all layers when the step
    makes its gradients itself, by a closure, or takes the scaler as an argument.

    Args:
        args, kwargs: of ``step``, the optimizer first, as a hook before it gets them.

    Returns:
        (units, inputs) and (units,) for each layer; None for a bias that is not trained.
    """
    options = dict(kwargs or {})
    closure = options.get("closure") is not None or any(x is not None for x in args[1:])
    if closure or "grad_scaler" in options:
        return {}
    factors = {
        p: -1.0 if group.get("maximize") else 1.0
        for group in optimizer.param_groups
        for p in group["params"]
    }
    scale = getattr(optimizer, "grad_scale", None)
    gradients = {}
    for name, module in modules.items():
        # Reading a parametrized weight would compute it.
        weight, bias = (layer_types.parameter(module, key) for key in ("weight", "bias"))
        g = _used_gradient(weight, factors, scale)
        if g is not None and (bias is not None or module.bias is None):
            g0 = _used_gradient(bias, factors, scale)
            g0 = None if g0 is None else layer_types.rows(module, g0)
            gradients[name] = layer_types.weights(module, layer_types.rows(module, g)), g0
    return gradients


def unit_weights(module: WeightLayer) -> tuple[Tensor, Tensor | None]:
    """Returns the weights (units, inputs) and biases (units,) of a layer, copied to float64.

    The copy stays what it is when an optimizer changes the layer. The bias is None where the layer
    has none.
    """
    w0 = None if module.bias is None else module.bias.detach().double().clone()
    return layer_types.weights(module).detach().double().clone(), w0


def _used_gradient(
    p: Tensor | None, factors: Mapping[Tensor, float], scale: Tensor | None
) -> Tensor | None:
    trained, index = (p, None) if p is None or p in factors else _stack_of(p, factors)
    if trained is None or trained.grad is None:
        return None
    grad = trained.grad.detach()
    grad = (grad if grad.layout == torch.strided else grad.to_dense()).double() * factors[trained]
    grad = grad if index is None else grad[index]
    return grad if scale is None else grad / scale.to(grad.device).double()


def _stack_of(p: Tensor, stacks: Iterable[Tensor]) -> tuple[Tensor | None, int]:
    """The parameter that ``p`` is a slice of, and which slice.

    The networks of an ensemble are views into what its optimizer trains.
    """
    for stack in stacks:
        if (
            type(stack) is nn.Parameter
            and stack.shape[1:] == p.shape
            and stack.stride()[1:] == p.stride()
            and stack.numel()
        ):
            offset = int(p.storage_offset() - stack.storage_offset())
            index, rest = divmod(offset, max(int(stack.stride(0)), 1))
            shared = stack.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
            if shared and rest == 0 and 0 <= index < len(stack):
                return stack, index
    return None, 0
