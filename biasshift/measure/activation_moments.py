"""Activation moments: the mean and variance of what every unit of an activation module returns."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from biasshift import display
from biasshift.measure import examples
from biasshift.measure.composites import COMPOSITES
from biasshift.measure.examples import Inputs
from biasshift.measure.hooks import output_hooks, underlying
from biasshift.measure.layer_types import Selection, selected_modules, why_uncovered
from biasshift.measure.probe import InputNames, Probe, batches
from biasshift.measure.sandbox import forward, undisturbed
from biasshift.measure.unit_axes import (
    NORMS_OF_LAST_AXES,
    UNITS_FIRST,
    UNITS_LAST,
    Axes,
    Followed,
    axes_behind,
)

if TYPE_CHECKING:
    import pandas as pd

UnitAxis = int | Mapping[str, int] | None
# elements of feature maps that are shifted at a time: a processor's cache holds them
PIECE = {"cpu": 2**17, "cuda": 2**26}


@dataclass(frozen=True, repr=False)
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

    def table(self) -> "pd.DataFrame":
        """Returns one row per unit: ``unit``, ``mean``, ``var``."""
        return display.unit_table({"mean": self.mean, "var": self.var})

    def __repr__(self) -> str:
        return (
            f"ActivationMoments({len(self.total)} units, {self.count} values each, "
            f"mean {display.middle(self.mean)}, var {display.middle(self.var)}, {self.dtype})"
        )

    def _repr_html_(self) -> str:
        numbers = {"mean": self.mean, "variance": self.var}
        rows = {name: {"median (range)": display.middle(x)} for name, x in numbers.items()}
        return display.page(f"{len(self.total)} units, {self.count} values each", rows)

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
    inputs: InputNames = None,
) -> dict[str, ActivationMoments]:
    """Returns the mean and variance of every unit of every activation module, by module name.

    Every childless module without parameters that returns a floating tensor counts, and activation
    functions with parameters: ``nn.PReLU``, and modules whose parameters are single numbers. The
    units of linear layers lie on the last axis, and those of convolutions on axis 1. From there
    they are followed through modules, views and operations, by shapes and strides. A module where
    two axes may be theirs is left out with a warning. A module that is called several times has one
    entry per call, ``"relu#0"``, ``"relu#1"``. Functional activations have no module: they appear
    as the incoming mean of the next layer (`unit_fisher`). The model is run in its present mode and
    left as found.

    Args:
        x: a tensor of examples, a dict of the model's arguments, or an iterable of batches x,
            (x, y) or dicts.
        layers: names, or a predicate ``(name, module) → bool``.
        unit_axis: the units' axis, for all modules or per module ``{name: axis}``, where the rule
            does not fit.
        batch_size: examples per forward pass, for a probe that does not fit at once.
        inputs: as in `unit_fisher`.

    Raises:
        ValueError: where the axis of the units is ambiguous in a module that ``layers`` names.

    >>> import torch
    >>> moments = activation_moments(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(4, 2))
    >>> moments["1"].mean.shape, moments["1"].count
    (torch.Size([3]), 4)
    """
    model = underlying(model)
    recorder = ActivationRecorder(model, layers, unit_axis)
    with undisturbed(model), output_hooks(recorder.modules, recorder.record):
        few: Inputs | None = None
        for batch in batches(model, x, None, batch_size, inputs=inputs):
            few = batch.x[:2] if few is None else few
            recorder.start_forward()
            forward(model, batch.x, recorder.restart_forward)
    if few is not None and recorder.undecided:
        recorder.decide(few)
    return recorder.moments(required=layers is not None and not callable(layers))


def activation_modules(model: nn.Module, select: Selection = None) -> dict[str, nn.Module]:
    """Returns the childless modules without parameters, and activations with them, by name.

    Args:
        select: names, a predicate ``(name, module) → bool``, or None for all.

    Raises:
        ValueError: for a name that is not such a module.
    """
    candidates = {
        name: module
        for name, module in _leaves(model).items()
        if name and (next(module.parameters(), None) is None or _is_parametric_activation(module))
    }
    return selected_modules(model, candidates, select, "activation module", candidates)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, and layers whose only children compute their parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".")
        and all(child == "parametrizations" for child, _ in module.named_children())
    }


def _is_parametric_activation(module: nn.Module) -> bool:
    """Learned slopes. A weight or a norm has a number per unit at least, except where it has one.

    Layers with units and norms are known by their kinds.
    """
    if isinstance(module, nn.PReLU):
        return True
    known = (*UNITS_FIRST, *UNITS_LAST, *NORMS_OF_LAST_AXES, *COMPOSITES, LazyModuleMixin)
    if isinstance(module, known) or why_uncovered(module) is not None:
        return False
    return all(p.numel() == 1 for p in module.parameters())


# -- over forward passes ---------------------------------------------------------------------------


@dataclass
class ActivationRecorder:
    """Adds up the outputs of activation modules over forward passes.

    Sums stay on the model's device, without waiting for it. ``record`` is an output hook for all
    ``modules``, and `start_forward` is called before every forward pass.
    """

    model: nn.Module
    select: Selection = None
    unit_axis: UnitAxis = None
    # By name and call within a forward pass, and by the axes that may hold the units.
    sums: dict[tuple[str, int], dict[int, ActivationMoments]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.activations = activation_modules(self.model, self.select)
        self.modules = _leaves(self.model)
        self.decided: dict[tuple[str, int], int] = {}
        self.shapes: dict[str, Axes] = {}
        self.reported: set[str] = set()
        self.start_forward()

    def start_forward(self) -> None:
        """Starts a new forward pass.

        Calls are counted from 0 again, and nothing is known of the units yet.
        """
        self.before = dict(self.sums)
        self.called: dict[str, int] = {}
        self.last = Followed(torch.empty(0), (), None)

    def restart_forward(self) -> None:
        """Forgets what was recorded since `start_forward`, for the forward pass to run again."""
        self.sums = self.before
        self.start_forward()

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        """Adds one output of an activation module, and follows the units through any module.

        Outputs that are not floating, or have no axis behind the examples, are left out.

        Raises:
            ValueError: for a ``unit_axis`` that the output does not have.
        """
        if not output.is_floating_point() or output.dim() < 2:
            return
        axes = axes_behind(module, a, output, self.last)
        if name in self.activations:
            key = name, self.called.get(name, 0)
            self.called[name] = key[1] + 1
            self.shapes[name] = tuple(output.shape)
            chosen = self._chosen_axis(name, output)
            axes = axes if chosen is None else (chosen % output.dim(),)
            if len(axes) > 1 and key in self.decided:
                axes = (self.decided[key],)
            old, x = self.sums.get(key), output.detach()
            batch = {
                axis: ActivationMoments.from_values(x, axis)
                for axis in axes
                if old is None or axis in old
            }
            self.sums[key] = batch if old is None else {i: old[i] + m for i, m in batch.items()}
        self.last = Followed.of(output, axes)

    def _chosen_axis(self, name: str, output: Tensor) -> int | None:
        chosen = self.unit_axis.get(name) if isinstance(self.unit_axis, Mapping) else self.unit_axis
        if chosen is not None and not (
            0 < chosen % output.dim() and -output.dim() <= chosen < output.dim()
        ):
            raise ValueError(
                f"'unit_axis' must be an axis of units of '{name}', whose output is "
                f"{tuple(output.shape)}, got {chosen}."
            )
        return chosen

    @property
    def undecided(self) -> list[tuple[str, int]]:
        """The calls of modules in which several axes may hold the units."""
        return [key for key, by_axis in self.sums.items() if len(by_axis) > 1]

    def decide(self, x: Inputs) -> None:
        """Runs the model on a few examples with gradients, which tell whether axes have moved."""
        recorder = ActivationRecorder(self.model, list(self.activations), self.unit_axis)
        # What a model raises that cannot run on few examples, or with gradients, is its own.
        with (
            suppress(Exception),
            undisturbed(self.model, gradients=True),
            output_hooks(recorder.modules, recorder.record),
        ):
            recorder.start_forward()
            examples.call(self.model, x.clone())
        for key in self.undecided:
            axes = recorder.sums.get(key, {})
            if len(axes) == 1:
                self.decided |= dict.fromkeys([key], *axes)

    def moments(self, required: bool = False) -> dict[str, ActivationMoments]:
        """Returns the moments so far, by module name.

        Modules that were called several times in one pass are named ``name#call``. Those whose axis
        of units is ambiguous are left out, with one warning.

        Args:
            required: whether such a module is an error.

        Raises:
            ValueError: where one is.
        """
        repeated = {name for name, call in self.sums if call > 0}
        known: dict[str, ActivationMoments] = {}
        ambiguous: dict[str, str] = {}
        for (name, call), by_axis in self.sums.items():
            axis = next(iter(by_axis)) if len(by_axis) == 1 else self.decided.get((name, call))
            if axis in by_axis:
                known[f"{name}#{call}" if name in repeated else name] = by_axis[axis]
            elif name not in self.reported:
                kind = type(self.activations[name]).__name__
                ambiguous[name] = f"'{name}' ({kind}, which returns {self.shapes[name]})"
        if ambiguous:
            names = " and ".join(ambiguous.values())
            remedy = f"Give unit_axis={{'{next(iter(ambiguous))}': axis}}"
            if required:
                raise ValueError(
                    f"Which axis holds the units is ambiguous in {names}. {remedy}, or leave it "
                    "out with layers=."
                )
            self.reported |= set(ambiguous)
            warnings.warn(
                f"Which axis holds the units is ambiguous in {names}, left out. {remedy} to have "
                "its moments.",
                stacklevel=3,
            )
        return known
