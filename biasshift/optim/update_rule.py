"""One rule of the family of updates: its center, its scale, and how they are estimated."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from biasshift.measure import layer_types, likelihoods
from biasshift.measure.coverage import tied
from biasshift.measure.layer_types import WeightLayer

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
    """One rule of the family of updates, and how its curvature is estimated."""

    center: str
    scale: str
    labels: str
    likelihood: str
    reduction: str
    weight_sharing: str
    dense_inputs: int = (
        2**62
        # beyond so many inputs of a unit, the full scale keeps the latest examples in place of its
        # matrices
    )

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def needs_errors(self) -> bool:
        """Whether δ² is read: for the mean under q, or for the scale c."""
        return self.center == "q" or self.scale != "none"

    def keeps_examples(self, inputs: int) -> bool:
        return self.scale == "full" and inputs > self.dense_inputs

    @property
    def needs_sums(self) -> bool:
        return self.needs_errors or self.center == "p"


# -- what the optimizer is given ---------------------------------------------------------------


def covered(root: nn.Module) -> dict[str, WeightLayer]:
    """The layers whose units have weights of their own, by name."""
    found = {
        name: module
        for name, module in root.named_modules()
        if layer_types.is_covered(module) and layer_types.why_uncovered(module) is None
    }
    shared = tied(root, found)
    return {
        name: module
        for name, module in found.items()
        if name not in shared and "weight" in module._parameters
    }


def refuse_large(layers: dict[str, WeightLayer], rule: UpdateRule, distributed: bool) -> None:
    """Linear layers of one process are solved with by their examples; others must keep the matrices
    of all their units.
    """
    by_examples = rule.center == "q" and not distributed
    for name, layer in layers.items():
        inputs, most = layer_types.input_count(layer), rule.dense_inputs
        if (
            inputs > most
            and layer.weight.requires_grad
            and not (by_examples and isinstance(layer, nn.Linear))
        ):
            raise ValueError(
                f"Layer '{name}' has {inputs} inputs a unit, more than max_dense_inputs={most}: "
                "its full matrices would take "
                f'{8 * layer_types.unit_count(layer) * inputs**2 / 1e9:.1f} GB. Use scale="diagonal", or '
                "raise max_dense_inputs."
            )


def check(
    model: object, lr: float | Tensor, momentum: float, weight_decay: float, damping: float, update_every: int, decay: float, most: int,
    kl_clip: float | None, unit_damping: float,
) -> None:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model must be the nn.Module itself, whose forward passes are watched, got "
            f"{type(model).__name__}."
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "The replicas of DataParallel cannot be watched: use DistributedDataParallel, or one "
            "device."
        )
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"Parameter '{lazy}' has no shape yet: run the model once before its optimizer is made."
        )
    rates = {
        "lr": lr,
        "weight_decay": weight_decay,
        "damping": damping,
        "unit_damping": unit_damping,
    }
    for name, value in rates.items():
        if not 0 <= _number(value) < math.inf:
            raise ValueError(f"{name} must be a finite number ≥ 0, got {value!r}.")
    if kl_clip is not None and not 0 < _number(kl_clip) < math.inf:
        raise ValueError(f"kl_clip must be a number above 0, or None, got {kl_clip!r}.")
    for name, value in {"momentum": momentum, "decay": decay}.items():
        if not 0 <= _number(value) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")
    for name, value in {"update_every": update_every, "max_dense_inputs": most}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}.")


def _number(value: Any) -> float:
    """Of Python, NumPy or PyTorch; NaN, which lies in no range, for what is none."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan
