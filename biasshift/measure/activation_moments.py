"""Mean activations: what every unit of every activation module puts out on average."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from biasshift.measure.hooks import output_hooks, underlying
from biasshift.measure.probe import Probe, Selection, batches
from biasshift.measure.sandbox import undisturbed

UnitAxis = int | Mapping[str, int] | None
UNITS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)  # axis 1, behind the examples
UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


@dataclass(frozen=True)
class ActivationMoments:
    """Mean and variance of every unit of an activation layer, as sums that merge exactly with
    ``+``.
    """

    count: int  # values per unit: examples × positions
    reference: Float[Tensor, " units"]
    total: Float[Tensor, " units"]  # Σ (x − reference), float64
    squares: Float[Tensor, " units"]  # Σ (x − reference)², float64
    dtype: torch.dtype = torch.float64

    @property
    def mean(self) -> Float[Tensor, " units"]:
        """The mean of every unit over examples and positions."""
        return (self.reference + self.total / self.count).to(self.dtype)

    @property
    def var(self) -> Float[Tensor, " units"]:
        """The variance of every unit under the data (divided by the count, not by count − 1)."""
        return (
            (self.squares / self.count - (self.total / self.count) ** 2).clamp(min=0).to(self.dtype)
        )

    @classmethod
    def from_values(cls, x: Tensor, unit_axis: int) -> "ActivationMoments":
        """The moments of one batch: examples first, units on ``unit_axis``, all other axes are
        positions.

        Without positions everything is float64. Feature maps are summed over positions in their own
        precision and over examples in float64, which costs a tenth of float64 throughout; nothing
        waits for the device.
        """
        axis = unit_axis % x.dim()
        places = [i for i in range(1, x.dim()) if i != axis]
        if not places:
            wide = x.double()
            reference = wide.mean(0)
            shifted = wide - reference
            return cls(len(x), reference, shifted.sum(0), shifted.square().sum(0), x.dtype)
        work = torch.promote_types(x.dtype, torch.float32)
        total = x.sum(places, dtype=work).sum(0, dtype=torch.float64)
        squares = torch.linalg.vector_norm(x, dim=places, dtype=work).double().square().sum(0)
        return cls(x.numel() // x.shape[axis], torch.zeros_like(total), total, squares, x.dtype)

    def __add__(self, other: "ActivationMoments") -> "ActivationMoments":
        d = other.reference - self.reference
        return ActivationMoments(
            self.count + other.count,
            self.reference,
            self.total + other.total + other.count * d,
            self.squares + other.squares + 2 * d * other.total + other.count * d * d,
            self.dtype,
        )


def activation_moments(
    model: nn.Module,
    x: Probe,
    *,
    layers: Selection = None,
    unit_axis: UnitAxis = None,
    batch_size: int | None = None,
) -> dict[str, ActivationMoments]:
    """Mean and variance of every unit of every activation module on probe data, by PyTorch's module
    names.

    Every childless module without parameters that returns a floating tensor counts. The units lie
    on the axis of the last weight or norm module that ran: the last axis behind linear layers, axis
    1 behind convolutions. A module that is called several times has one entry per call,
    ``"relu#0"``, ``"relu#1"``. Functional activations have no module: they appear as the incoming
    mean of the next layer (`unit_fisher`). The model is run in its present mode and left as found.

    Args:
        x: a tensor of examples, or an iterable of batches x or (x, y).
        layers: names, or a predicate ``(name, module) → bool``.
        unit_axis: the units' axis, for all modules or per module ``{name: axis}``, where the rule
            does not fit.

    Raises:
        ValueError: when the axis of the units is ambiguous; the sentence names the module.

    >>> import torch
    >>> moments = activation_moments(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(4, 2))
    >>> moments["1"].mean.shape, moments["1"].count
    (torch.Size([3]), 4)
    """
    model = underlying(model)
    watcher = ActivationWatcher(model, layers, unit_axis)
    with undisturbed(model), output_hooks(watcher.modules, watcher.record):
        for a, _ in batches(model, x, None, batch_size):
            watcher.start_forward()
            model(a)
    return watcher.moments()


def activation_modules(model: nn.Module, select: Selection = None) -> dict[str, nn.Module]:
    """Childless modules without parameters, by name.

    Raises:
        ValueError: for a name that is not such a module.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name
        and next(module.children(), None) is None
        and next(module.parameters(), None) is None
    }
    if select is None:
        return found
    if callable(select):
        return {name: module for name, module in found.items() if select(name, module)}
    names = [select] if isinstance(select, str) else list(select)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"The model has no activation module {', '.join(map(repr, unknown))}. It has "
            f"{', '.join(map(repr, found))}."
        )
    return {name: found[name] for name in names}


@dataclass
class ActivationWatcher:
    """Adds up the outputs of activation modules over forward passes, on their device, without
    waiting for it.
    """

    model: nn.Module
    select: Selection = None
    unit_axis: UnitAxis = None
    sums: dict[tuple[str, int], ActivationMoments] = field(
        default_factory=dict
    )  # by name and call within a forward pass

    def __post_init__(self) -> None:
        self.activations = activation_modules(self.model, self.select)
        setters = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, UNITS_FIRST + UNITS_LAST)
        }
        self.modules = {**setters, **self.activations}
        self.start_forward()

    def start_forward(self) -> None:
        """A new forward pass: calls are counted from 0 again."""
        self.called: dict[str, int] = {}
        self.axis: int | None = None
        self.units = 0

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if name in self.activations:
            if output.is_floating_point() and output.dim() >= 2:
                key = (name, self.called.get(name, 0))
                self.called[name] = key[1] + 1
                batch = ActivationMoments.from_values(
                    output.detach(), self._axis(name, module, output)
                )
                self.sums[key] = self.sums[key] + batch if key in self.sums else batch
        else:
            self.axis = 1 if isinstance(module, UNITS_FIRST) else -1
            self.units = output.shape[self.axis]

    def _axis(self, name: str, module: nn.Module, output: Tensor) -> int:
        chosen = self.unit_axis.get(name) if isinstance(self.unit_axis, Mapping) else self.unit_axis
        if chosen is not None:
            if not (0 < chosen % output.dim() and -output.dim() <= chosen < output.dim()):
                raise ValueError(
                    f"unit_axis={chosen} is not an axis of units of '{name}', whose output is "
                    f"{tuple(output.shape)}."
                )
            return chosen
        if output.dim() == 2:
            return 1
        if self.axis is None or output.shape[self.axis] != self.units:
            before = (
                "no weight or norm layer has run before it"
                if self.axis is None
                else f"the layer before it has {self.units} units"
            )
            raise ValueError(
                f"Module '{name}' ({type(module).__name__}) returns {tuple(output.shape)}, and "
                "which axis holds the units is ambiguous: "
                f"{before}. Give unit_axis={{'{name}': axis}}, or leave it out with layers=."
            )
        return self.axis

    def moments(self) -> dict[str, ActivationMoments]:
        """The sums so far, named ``name#call`` where a module was called several times in one pass."""
        repeated = {name for name, call in self.sums if call > 0}
        return {
            f"{name}#{call}" if name in repeated else name: moments
            for (name, call), moments in self.sums.items()
        }
