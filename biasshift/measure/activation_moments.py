"""Activation moments: the mean and variance of what every unit of an activation module returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from biasshift.measure.hooks import output_hooks, underlying
from biasshift.measure.layer_types import Selection, selected_modules
from biasshift.measure.probe import Probe, batches
from biasshift.measure.sandbox import forward, undisturbed

UnitAxis = int | Mapping[str, int] | None
# Units on axis 1, behind the examples; and on the last axis.
UNITS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
# elements of feature maps that are shifted at a time: a processor's cache holds them
PIECE = {"cpu": 2**17, "cuda": 2**26}


@dataclass(frozen=True)
class ActivationMoments:
    """Mean and variance of every unit of an activation layer.

    They are held as sums about a reference, which merge exactly with ``+``.

    >>> halves = [ActivationMoments.from_values(x, 1) for x in torch.eye(4).split(2)]
    >>> (halves[0] + halves[1]).mean
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
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
        variance = self.squares / self.count - (self.total / self.count) ** 2
        return variance.clamp(min=0).to(self.dtype)

    @classmethod
    def from_values(cls, x: Tensor, unit_axis: int) -> "ActivationMoments":
        """Returns the moments of one batch.

        Without positions everything is float64. Feature maps are summed over positions in their own
        precision and over examples in float64, which costs a tenth of float64 throughout. They are
        shifted by the mean of the first example before, since squares of large means would drown
        the variance. Nothing waits for the device.

        Args:
            x: examples first, units on ``unit_axis``; all other axes are positions.
        """
        axis = unit_axis % x.dim()
        places = [i for i in range(1, x.dim()) if i != axis]
        if not places:
            wide = x.double()
            reference = wide.mean(0)
            shifted = wide - reference
            return cls(len(x), reference, shifted.sum(0), shifted.square().sum(0), x.dtype)
        work = torch.promote_types(x.dtype, torch.float32)
        every, count = [0, *places], x.numel() // max(1, x.shape[axis])
        per_example = x.numel() // max(1, len(x))
        first = x[:1].sum(every, dtype=work, keepdim=True) / max(1, count // max(1, len(x)))
        sums, norms = [], []
        step = max(1, PIECE.get(x.device.type, PIECE["cuda"]) // max(1, per_example))
        for piece in x.split(step):
            shifted = piece - first
            sums.append(shifted.sum(places))
            norms.append(torch.linalg.vector_norm(shifted, dim=places))
        total = torch.cat(sums).sum(0, dtype=torch.float64)
        squares = torch.cat(norms).double().square().sum(0)
        return cls(count, first.flatten().double(), total, squares, x.dtype)

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
    """Returns the mean and variance of every unit of every activation module, by module name.

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
        batch_size: examples per forward pass, for a probe that does not fit at once.

    Raises:
        ValueError: where the axis of the units is ambiguous; the message names the module.

    >>> import torch
    >>> moments = activation_moments(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(4, 2))
    >>> moments["1"].mean.shape, moments["1"].count
    (torch.Size([3]), 4)
    """
    model = underlying(model)
    recorder = ActivationRecorder(model, layers, unit_axis)
    with undisturbed(model), output_hooks(recorder.modules, recorder.record):
        for a, _ in batches(model, x, None, batch_size):
            recorder.start_forward()
            forward(model, a, recorder.restart_forward)
    return recorder.moments()


def activation_modules(model: nn.Module, select: Selection = None) -> dict[str, nn.Module]:
    """Returns the childless modules without parameters, by name.

    Args:
        select: names, a predicate ``(name, module) → bool``, or None for all.

    Raises:
        ValueError: for a name that is not such a module.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name
        and next(module.children(), None) is None
        and next(module.parameters(), None) is None
    }
    return selected_modules(model, candidates, select, "activation module", candidates)


@dataclass
class ActivationRecorder:
    """Adds up the outputs of activation modules over forward passes.

    Sums stay on the model's device, without waiting for it. ``record`` is an output hook for all
    ``modules``, and `start_forward` is called before every forward pass.
    """

    model: nn.Module
    select: Selection = None
    unit_axis: UnitAxis = None
    # by name and call within a forward pass
    sums: dict[tuple[str, int], ActivationMoments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.activations = activation_modules(self.model, self.select)
        named = self.model.named_modules()
        setters = {name: m for name, m in named if isinstance(m, UNITS_FIRST + UNITS_LAST)}
        self.modules = {**setters, **self.activations}
        self.start_forward()

    def start_forward(self) -> None:
        """Starts a new forward pass.

        Calls are counted from 0 again, and no weight or norm module has set the unit axis yet.
        """
        self.before = dict(self.sums)
        self.called: dict[str, int] = {}
        self.axis: int | None = None
        self.units = 0

    def restart_forward(self) -> None:
        """Forgets what was recorded since `start_forward`, for the forward pass to run again."""
        self.sums = self.before
        self.start_forward()

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        """Adds one output of an activation module, or notes the unit axis of any other module.

        Outputs that are not floating, or have no unit axis behind the examples, are left out.

        Raises:
            ValueError: where the axis of the units is ambiguous.
        """
        if name not in self.activations:
            self.axis = 1 if isinstance(module, UNITS_FIRST) else -1
            self.units = output.shape[self.axis]
        elif output.is_floating_point() and output.dim() >= 2:
            call = self.called.get(name, 0)
            self.called[name] = call + 1
            axis, old = self._axis(name, module, output), self.sums.get((name, call))
            batch = ActivationMoments.from_values(output.detach(), axis)
            self.sums[name, call] = batch if old is None else old + batch

    def _axis(self, name: str, module: nn.Module, output: Tensor) -> int:
        chosen = self.unit_axis.get(name) if isinstance(self.unit_axis, Mapping) else self.unit_axis
        if chosen is not None:
            if not (0 < chosen % output.dim() and -output.dim() <= chosen < output.dim()):
                raise ValueError(
                    f"'unit_axis' must be an axis of units of '{name}', whose output is "
                    f"{tuple(output.shape)}, got {chosen}."
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
                f"which axis holds the units is ambiguous: {before}. Give unit_axis={{'{name}': "
                "axis}, or leave it out with layers=."
            )
        return self.axis

    def moments(self) -> dict[str, ActivationMoments]:
        """Returns the moments so far, by module name.

        Modules that were called several times in one pass are named ``name#call``.
        """
        repeated = {name for name, call in self.sums if call > 0}
        return {
            f"{name}#{call}" if name in repeated else name: moments
            for (name, call), moments in self.sums.items()
        }
