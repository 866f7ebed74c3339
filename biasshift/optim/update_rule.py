"""One rule of the family of updates: its center, its scale, and how they are estimated.

`UpdateRule` is the rule. The functions below it check what an optimizer is given with it, and find
the layers that it covers.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from biasshift.measure import layer_types, likelihoods
from biasshift.measure.coverage import refuse, skipped_names, tied, warn_of_left_out
from biasshift.measure.layer_types import Selection, WeightLayer
from biasshift.measure.outputs import OutputChoice

CHOICES = {
    "center": ("q", "p", "none"),
    "scale": ("full", "diagonal", "none"),
    "labels": ("sampled", "empirical"),
    "likelihood": likelihoods.LIKELIHOODS,
    "reduction": ("mean", "sum"),
    "weight_sharing": ("per_example", "expand"),
}


@dataclass(frozen=True)
class UpdateRule:
    """One rule of the family of updates, and how its curvature is estimated.

    The options are those of `UnitNaturalGradient`.

    Raises:
        ValueError: If an option has a value that is not in `CHOICES`.
    """

    center: str
    scale: str
    labels: str
    likelihood: str
    reduction: str
    weight_sharing: str
    # With more inputs a unit, the full scale keeps the latest examples in place of its matrices.
    dense_inputs: int = 2**62

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"'{name}' must be one of {', '.join(map(repr, choices))}, got {value!r}."
                )

    @property
    def needs_errors(self) -> bool:
        """Whether δ² is read: for the mean under q, or for the scale c."""
        return self.center == "q" or self.scale != "none"

    @property
    def needs_sums(self) -> bool:
        """Whether anything but the gradient is read."""
        return self.needs_errors or self.center == "p"

    def keeps_examples(self, inputs: int) -> bool:
        """Returns whether a layer of so many inputs keeps examples in place of matrices."""
        return self.scale == "full" and inputs > self.dense_inputs


@dataclass(frozen=True)
class OutputRule:
    """How an optimizer reads the model's outputs, and what it does with layers that do not fit.

    The options are those of `UnitNaturalGradient`.

    Raises:
        ValueError: If an option has a value that does not fit.
    """

    class_axis: int = -1
    mask: Any = None
    output: OutputChoice = None
    uncovered: str = "skip"
    skip: Selection = None

    def __post_init__(self) -> None:
        if isinstance(self.class_axis, bool) or not isinstance(self.class_axis, int):
            raise ValueError(f"'class_axis' must be a whole number, got {self.class_axis!r}.")
        if self.uncovered not in ("skip", "raise"):
            raise ValueError(f"'uncovered' must be 'skip' or 'raise', got {self.uncovered!r}.")
        if self.mask is not None and not callable(self.mask):
            raise ValueError(
                "'mask' must be a function of the model's inputs and labels, got "
                f"{type(self.mask).__name__}."
            )


def covered(root: nn.Module, outputs: OutputRule) -> dict[str, WeightLayer]:
    """Returns the layers whose units have weights of their own, by name.

    Left out are layers of other kinds, weights that are tied to another module, and weights that
    are computed by a parametrization: they take the plain gradient.

    Raises:
        ValueError: If there are such layers and ``outputs.uncovered`` is "raise".

    Warns:
        UncoveredWarning: If there are such layers, which ``outputs.skip`` does not name.
    """
    skipped = skipped_names(root, outputs.skip)
    named = {name: module for name, module in root.named_modules() if name not in skipped}
    reasons = {name: why for name, m in named.items() if (why := layer_types.why_uncovered(m))}
    layers = {
        name: module
        for name, module in named.items()
        if layer_types.is_covered(module) and name not in reasons
    }
    reasons |= tied(root, layers)
    for name, module in layers.items():
        if "weight" not in module._parameters:
            reasons.setdefault(name, "its weight is computed by a parametrization")
    if outputs.uncovered == "raise":
        refuse(named, reasons)
    warn_of_left_out(root, reasons, stacklevel=5)
    return {name: module for name, module in layers.items() if name not in reasons}


def refuse_large(layers: dict[str, WeightLayer], rule: UpdateRule, distributed: bool) -> None:
    """Raises ValueError for layers too large for matrices that need matrices all the same.

    Linear layers of one process are solved with by their examples, under the center q. All others
    must keep the matrices of all their units.
    """
    by_examples = rule.center == "q" and not distributed
    for name, layer in layers.items():
        inputs, most = layer_types.input_count(layer), rule.dense_inputs
        keeps_matrices = layer.weight.requires_grad and not (
            by_examples and isinstance(layer, layer_types.LINEAR)
        )
        if inputs > most and keeps_matrices:
            gigabytes = 8 * layer_types.unit_count(layer) * inputs**2 / 1e9
            raise ValueError(
                f"Layer '{name}' has {inputs} inputs a unit, more than max_dense_inputs={most}: "
                f"its full matrices would take {gigabytes:.1f} GB. "
                'Use scale="diagonal", or raise max_dense_inputs.'
            )


def check(
    model: object,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    damping: float,
    update_every: int,
    decay: float,
    max_dense_inputs: int,
    kl_clip: float | None,
    unit_damping: float,
) -> None:
    """Raises ValueError for a model or numbers that an optimizer cannot work with.

    The numbers are the arguments of `UnitNaturalGradient` of the same names. They may be of Python,
    NumPy or PyTorch, but neither text nor NaN.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "'model' must be an nn.Module, whose forward passes are recorded, got "
            f"{type(model).__name__}."
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "The forward passes of DataParallel's replicas cannot be recorded. Use "
            "DistributedDataParallel, or one device."
        )
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"Parameter '{lazy}' has no shape yet. Run the model once before making its optimizer."
        )
    for name, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("damping", damping),
        ("unit_damping", unit_damping),
    ):
        if not 0 <= _number(value) < math.inf:
            raise ValueError(f"'{name}' must be a finite number ≥ 0, got {value!r}.")
    if kl_clip is not None and not 0 < _number(kl_clip) < math.inf:
        raise ValueError(f"'kl_clip' must be a finite number > 0, or None, got {kl_clip!r}.")
    for name, value in (("momentum", momentum), ("decay", decay)):
        if not 0 <= _number(value) < 1:
            raise ValueError(f"'{name}' must lie in [0, 1), got {value!r}.")
    for name, value in (("update_every", update_every), ("max_dense_inputs", max_dense_inputs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"'{name}' must be a whole number ≥ 1, got {value!r}.")


def _number(value: Any) -> float:
    """Of Python, NumPy or PyTorch; NaN, which lies in no range, for anything else."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan
