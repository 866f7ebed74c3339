"""The gradient gap: the angle between a layer's plain gradient and its unit natural gradient.

Also the bias shift that a step along each of them would cause.
"""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from biasshift import theory
from biasshift.fisher.cholesky import variances
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.accumulators import Measured
from biasshift.measure.fisher import measure
from biasshift.measure.layer_types import Selection
from biasshift.measure.likelihoods import Labels, Likelihood
from biasshift.measure.options import Mask, Options, Units
from biasshift.measure.outputs import OutputChoice
from biasshift.measure.probe import InputNames, Probe
from biasshift.progress import Show, progress as shown
from biasshift.theory import dot

Update = tuple[Tensor, Tensor | None]  # Δw (units, inputs), and Δw₀ (units,) where there is a bias
NAN = float("nan")


def gradient_gap(
    model: nn.Module,
    x: Probe,
    y: Any = None,
    *,
    labels: Labels = "expected",
    likelihood: Likelihood = "categorical",
    weight_sharing: str = "per_example",
    layers: Selection = None,
    units: Units = None,
    damping: float = 1e-4,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    class_axis: int = -1,
    mask: Mask = None,
    inputs: InputNames = None,
    output: OutputChoice = None,
    uncovered: str = "skip",
    skip: Selection = None,
    progress: Show = None,
) -> pd.DataFrame:
    """Returns cosines between gradient and unit natural gradient, one row per layer.

    The gradient is that of the mean negative log-likelihood on the probe. Cosines are Euclidean,
    over the stacked ``(w, w₀)`` of all units that are neither dead nor singular and whose bias is
    not inert. Two cheap corrections of the gradient stand beside it. What the centered gradient
    gains over the plain one is the part of the gap that bias shift explains. What the
    quasi-diagonal one gains beyond that is the scale of the inputs.

    Args:
        x: a tensor of examples with labels ``y``, or an iterable of batches (x, y).
        labels, likelihood, weight_sharing, layers, units, damping, batch_size, generator,
            class_axis, mask, inputs, output, uncovered, skip, progress: as in `unit_fisher`.

    Returns:
        Columns ``layer``, ``cos_gradient``, ``cos_centered``, ``cos_diagonal``, ``norm_ratio``
        (‖gradient‖ / ‖unit natural gradient‖), ``mean_in_abs`` (the mean of \\|E_p(a)\\| over
        inputs), ``units`` (in the cosines), ``excluded`` (all others), ``effective_samples``
        (their median), ``inputs``, ``labels``, ``norm_ratio_centered``, ``norm_ratio_diagonal`` (as
        ``norm_ratio``), and ``gap_explained``. The last is the gain of the centered gradient as a
        share of 1 − ``cos_gradient``: what bias shift explains of the gap. It is negative where
        centering leads away. Layers without a bias have NaN where something is centered.

    Raises:
        ValueError: as `unit_fisher`, and where there are no labels.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> gradient_gap(model, torch.eye(3), torch.tensor([0, 1, 0])).layer.tolist()
    ['0', '2']
    """
    options = Options(
        labels=labels,
        likelihood=likelihood,
        weight_sharing=weight_sharing,
        layers=layers,
        units=units,
        damping=damping,
        batch_size=batch_size,
        generator=generator,
        class_axis=class_axis,
        mask=mask,
        inputs=inputs,
        output=output,
        uncovered=uncovered,
        skip=skip,
    )
    rows = []
    with shown("gradient_gap", progress) as bar:
        measured = measure(model, x, y, options, gradient=True, progress=bar)
        bar.begin(len(measured), "layers")
        for name, layer in measured.items():
            rows.append({"layer": name, **gap(layer)})
            bar.advance()
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Directions:
    """The gradient of a layer and three updates made of it, from one solve.

    The centered gradient corrects bias shift and nothing else. The quasi-diagonal one also divides
    by the variance of every input, and the natural gradient by their whole covariance.
    """

    plain: Update
    natural: Update  # of Theorem 1
    centered: Update | None  # None without a bias
    diagonal: Update

    @classmethod
    def of(cls, layer: Measured) -> "Directions":
        """Returns the updates of a layer that was measured with its gradient."""
        fisher, g, g0 = layer.fisher, layer.g, layer.g0
        assert g is not None
        return cls(
            plain=(g, g0),
            natural=fisher.natural_gradient(g, g0),
            centered=None if g0 is None else _centered_gradient(fisher, g, g0),
            diagonal=_quasi_diagonal_gradient(fisher, g, g0),
        )


def gap(layer: Measured) -> dict[str, float | str]:
    """Returns the row of one layer, with the columns of `gradient_gap` but ``layer``.

    Cosines and norms are over all units that are neither dead nor singular and whose bias is not
    inert, stacked; NaN where there are none.

    Args:
        layer: measured with its gradient.
    """
    fisher, updates = layer.fisher, Directions.of(layer)
    used = ~(fisher.dead | fisher.singular | fisher.bias_inert)
    plain, natural, diagonal = (
        _stacked(*update)[used] for update in (updates.plain, updates.natural, updates.diagonal)
    )
    centered = None if updates.centered is None else _stacked(*updates.centered)[used]
    cos_gradient = _cosine(plain, natural)
    cos_centered = NAN if centered is None else _cosine(centered, natural)
    effective_samples = fisher.sums.effective_samples[used]
    gained = cos_centered - cos_gradient
    return {
        "cos_gradient": cos_gradient,
        "cos_centered": cos_centered,
        "cos_diagonal": _cosine(diagonal, natural),
        "norm_ratio": _ratio(plain, natural),
        "mean_in_abs": fisher.sums.mean_p.abs().mean().item(),
        "units": int(used.sum()),
        "excluded": int((~used).sum()),
        "effective_samples": effective_samples.median().item() if used.any() else NAN,
        "inputs": plain.shape[1] - (centered is not None),
        "labels": fisher.labels,
        "norm_ratio_centered": NAN if centered is None else _ratio(centered, natural),
        "norm_ratio_diagonal": _ratio(diagonal, natural),
        "gap_explained": gained / (1 - cos_gradient) if cos_gradient < 1 else NAN,
    }


@dataclass(frozen=True, eq=False)
class PredictedShift:
    """By how much three updates of one gradient would move the mean net input of a layer's units.

    The updates are the gradient that the optimizer is about to use, its centered form, and Theorem
    1's update of it, with the Fisher matrices and incoming means of the probe before the step. The
    gradient itself is not kept. NaN stands where a unit's gradient is not finite, and for Theorem 1
    where the unit is dead or singular. Without a trained bias there is nothing to center with.
    """

    shifts: dict[str, Tensor]  # −(μᵀΔw + Δw₀), (units,), by the name of the update
    lengths: dict[str, Tensor]  # ‖(Δw, Δw₀)‖
    weights: Update  # from before the step

    @classmethod
    def of(cls, fisher: UnitFisher, gradient: Update, weights: Update) -> "PredictedShift":
        """Predicts the shifts of a layer before a step.

        Args:
            fisher: of the probe, before the step.
            gradient: (units, inputs) and (units,); None for a bias that is not trained.
            weights: from before the step, in the same shapes.
        """
        g, g0 = gradient
        fisher = fisher if g0 is not None else replace(fisher, bias=False)
        updates = Directions.of(Measured(fisher, g, g0))
        mu, finite = fisher.sums.mean_p, _stacked(g, g0).isfinite().all(1)
        shifts, lengths = {}, {}
        for name, update in (
            ("gradient", updates.plain),
            ("centered", updates.centered),
            ("natural", updates.natural),
        ):
            dw, dw0 = update or (torch.full_like(g, torch.nan), None)
            zeros = torch.zeros_like(fisher.sums.weight)
            shift = -theory.bias_shift(mu, dw.double(), zeros if dw0 is None else dw0.double())
            shifts[name] = shift.where(finite, torch.nan)
            lengths[name] = _stacked(dw, dw0).norm(dim=1)
        return cls(shifts, lengths, weights)

    def columns(self, weights: Update) -> dict[str, Tensor]:
        """Returns ``shift_…`` of a step of size 1, and ``own_…`` of one as long as the actual step.

        ``shift_natural`` is Theorem 2's shift. ``own_…`` compares with ``own``, what the
        optimizer's update did. Lengths are taken unit by unit: the theorem's factor 1/c, a learning
        rate of every unit, drops out, as does the optimizer's, and what is left is the direction.
        Plain gradient descent has ``own = lr · shift_gradient = own_gradient``. With momentum,
        weight decay or a scaling of the gradient the actual update goes elsewhere, and the
        difference is theirs.

        Args:
            weights: those that the actual step led to.
        """
        (w, w0), (old, old0) = weights, self.weights
        moved = _stacked(w - old, None if w0 is None or old0 is None else w0 - old0).norm(dim=1)
        columns = {f"shift_{name}": shift for name, shift in self.shifts.items()}
        for name, length in self.lengths.items():
            shift = self.shifts[name]
            columns[f"own_{name}"] = torch.where(moved == 0, 0 * shift, moved * shift / length)
        return columns


def _centered_gradient(fisher: UnitFisher, g: Tensor, g0: Tensor) -> tuple[Tensor, Tensor]:
    """``Δw = g − g₀ m``, ``Δw₀ = g₀ − mᵀΔw``: the correction of bias shift without any scaling."""
    m = fisher.sums.mean_q
    dw = g - g0[:, None] * m
    return dw, g0 - dot(m, dw)


def _quasi_diagonal_gradient(
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
    return (x.norm() / y.norm()).item() if len(x) else NAN


def _cosine(x: Tensor, y: Tensor) -> float:
    return (dot(x.flatten(), y.flatten()) / (x.norm() * y.norm())).item() if len(x) else NAN
