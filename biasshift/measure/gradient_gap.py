"""The gradient gap: how far the plain gradient of a layer points away from its unit natural
gradient, and what each would shift.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biasshift import theory
from biasshift.fisher.cholesky import variances
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.fisher import measure
from biasshift.measure.likelihoods import Labels, Likelihood
from biasshift.measure.options import Measured, Options, Units
from biasshift.measure.probe import Probe, Selection
from biasshift.theory import dot

if TYPE_CHECKING:
    import pandas as pd

Update = tuple[Tensor, Tensor | None]


def gradient_gap(
    model: nn.Module,
    x: Probe,
    y: Tensor | None = None,
    *,
    labels: Labels = "expected",
    likelihood: Likelihood = "categorical",
    weight_sharing: str = "per_example",
    layers: Selection = None,
    units: Units = None,
    damping: float = 1e-4,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> "pd.DataFrame":
    """One row per layer: cosines of the gradient, and of two cheap corrections of it, to the unit
    natural gradient.

    The gradient is that of the mean negative log-likelihood on the probe. Cosines are Euclidean,
    over the stacked ``(w, w₀)`` of all units that are neither dead nor singular. What the centered
    gradient gains over the plain one is the part of the gap that bias shift explains; what the
    quasi-diagonal one gains beyond that is the scale of the inputs.

    Args:
        x: a tensor of examples with labels ``y``, or an iterable of batches (x, y). The rest as in
            `unit_fisher`.

    Returns:
        Columns ``layer``, ``cos_gradient``, ``cos_centered``, ``cos_diagonal``, ``norm_ratio``
        (‖gradient‖ / ‖unit natural gradient‖), ``mean_in_abs`` (the mean of \\|E_p(a)\\| over
        inputs), ``units`` (in the cosines), ``excluded`` (dead or singular), ``effective_samples``
        (their median), ``inputs``, ``labels``, ``norm_ratio_centered`` and ``norm_ratio_diagonal``
        (as ``norm_ratio``), ``gap_explained`` (the gain of the centered gradient, as a share of 1 −
        ``cos_gradient``: what bias shift explains of the gap; negative where centering leads away).
        Layers without a bias have NaN where something is centered.

    Raises:
        ValueError: as `unit_fisher`, and when there are no labels.
    """
    import pandas as pd

    options = Options(
        labels, likelihood, weight_sharing, layers, units, damping, batch_size, generator
    )
    measured = measure(model, x, y, options, gradient=True)
    return pd.DataFrame([{"layer": name, **gap(layer)} for name, layer in measured.items()])


@dataclass(frozen=True, eq=False)
class Directions:
    """The gradient of a layer and three updates made of it, each ``(Δw (units, inputs), Δw₀
    (units,) or None)``; one solve.
    """

    plain: Update
    natural: Update
    centered: Update | None  # None without a bias
    diagonal: Update

    @classmethod
    def of(cls, layer: Measured) -> "Directions":
        """Of a layer that was measured with its gradient."""
        fisher, g, g0 = layer.fisher, layer.g, layer.g0
        assert g is not None
        centered = None if g0 is None else centered_gradient(fisher, g, g0)
        return cls(
            (g, g0),
            fisher.natural_gradient(g, g0),
            centered,
            quasi_diagonal_gradient(fisher, g, g0),
        )


def gap(layer: Measured) -> dict[str, float | str]:
    """The row of one layer."""
    fisher, to = layer.fisher, Directions.of(layer)
    used = ~(fisher.dead | fisher.singular)
    plain, natural, diagonal = (
        _stacked(*update)[used] for update in (to.plain, to.natural, to.diagonal)
    )
    centered = None if to.centered is None else _stacked(*to.centered)[used]
    cos_gradient, cos_centered = (
        _cosine(plain, natural),
        float("nan") if centered is None else _cosine(centered, natural),
    )
    return {
        "cos_gradient": cos_gradient,
        "cos_centered": cos_centered,
        "cos_diagonal": _cosine(diagonal, natural),
        "norm_ratio": _ratio(plain, natural),
        "mean_in_abs": fisher.sums.mean_p.abs().mean().item(),
        "units": int(used.sum()),
        "excluded": int((~used).sum()),
        "effective_samples": fisher.sums.effective_samples[used].median().item()
        if used.any()
        else float("nan"),
        "inputs": plain.shape[1] - (to.centered is not None),
        "labels": fisher.labels,
        "norm_ratio_centered": float("nan") if centered is None else _ratio(centered, natural),
        "norm_ratio_diagonal": _ratio(diagonal, natural),
        "gap_explained": (cos_centered - cos_gradient) / (1 - cos_gradient)
        if cos_gradient < 1
        else float("nan"),
    }


@dataclass(frozen=True, eq=False)
class Foreseen:
    """By how much three updates of one gradient would move the mean net input of a layer's units;
    the gradient itself is not kept.

    Along the gradient that the optimizer is about to use, along its centered form, and along
    Theorem 1's update of it, with the Fisher matrices and incoming means of the probe before the
    step. NaN where a unit's gradient is not finite, for Theorem 1 where the unit is dead or
    singular, and without a bias that is trained there is nothing to center with.
    """

    shifts: dict[str, Tensor]  # −(μᵀΔw + Δw₀), (units,), by the name of the update
    lengths: dict[str, Tensor]  # ‖(Δw, Δw₀)‖
    weights: Update  # from before the step

    @classmethod
    def of(cls, fisher: UnitFisher, gradient: Update, weights: Update) -> "Foreseen":
        """Of a layer before a step; the gradient of a bias that stays as it is, is None."""
        g, g0 = gradient
        to = Directions.of(
            Measured(fisher if g0 is not None else replace(fisher, bias=False), g, g0)
        )
        mu, finite = fisher.sums.mean_p, _stacked(g, g0).isfinite().all(1)
        shifts, lengths = {}, {}
        for name, update in {
            "gradient": to.plain,
            "centered": to.centered,
            "natural": to.natural,
        }.items():
            dw, dw0 = update or (torch.full_like(g, torch.nan), None)
            none = torch.zeros_like(fisher.sums.weight)
            shift = -theory.bias_shift(mu, dw.double(), none if dw0 is None else dw0.double())
            shifts[name] = shift.where(finite, torch.nan)
            lengths[name] = _stacked(dw, dw0).norm(dim=1)
        return cls(shifts, lengths, weights)

    def columns(self, weights: Update) -> dict[str, Tensor]:
        """``shift_…`` of a step of size 1, and ``own_…`` of one as long as the step that led to
        ``weights``.

        ``shift_natural`` is Theorem 2's shift. ``own_…`` compares with ``own``, what the
        optimizer's update did. Lengths are taken unit by unit: the theorem's factor 1/c, a learning
        rate of every unit, drops out, as does the optimizer's, and what is left is the direction.
        Plain gradient descent has ``own = lr · shift_gradient = own_gradient``; with momentum,
        weight decay or a scaling of the gradient the actual update goes elsewhere, and the
        difference is theirs.
        """
        (w, w0), (old, old0) = weights, self.weights
        moved = _stacked(w - old, None if w0 is None or old0 is None else w0 - old0).norm(dim=1)
        found = {f"shift_{name}": shift for name, shift in self.shifts.items()}
        for name, length in self.lengths.items():
            found[f"own_{name}"] = torch.where(
                moved == 0, 0 * self.shifts[name], moved * self.shifts[name] / length
            )
        return found


def centered_gradient(fisher: UnitFisher, g: Tensor, g0: Tensor) -> tuple[Tensor, Tensor]:
    """``Δw = g − g₀ m``, ``Δw₀ = g₀ − mᵀΔw``: the pure correction of bias shift, without any
    scaling.
    """
    m = fisher.sums.mean_q
    dw = g - g0[:, None] * m
    return dw, g0 - dot(m, dw)


def quasi_diagonal_gradient(
    fisher: UnitFisher, g: Tensor, g0: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Theorem 1 with the diagonal of V for V (Ollivier 2015); without a bias the diagonal of A."""
    m, c, variance = fisher.sums.mean_q, fisher.sums.mean_delta2[:, None], variances(fisher.sums)
    variance = variance + fisher.damping * variance.mean(1, keepdim=True)
    if g0 is None:
        return g / (c * (variance + m**2)), None
    dw = (g - g0[:, None] * m) / (c * variance)
    return dw, g0 / c[:, 0] - dot(m, dw)


def _stacked(w: Tensor, w0: Tensor | None) -> Tensor:
    return w.double() if w0 is None else torch.cat([w, w0[:, None]], 1).double()


def _ratio(x: Tensor, y: Tensor) -> float:
    return (x.norm() / y.norm()).item() if len(x) else float("nan")


def _cosine(x: Tensor, y: Tensor) -> float:
    if not len(x):
        return float("nan")
    return (dot(x.flatten(), y.flatten()) / (x.norm() * y.norm())).item()
