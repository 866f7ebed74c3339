"""The gradient gap: how far the plain gradient of a layer points away from its unit natural gradient."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biasshift.accumulating import Measured, Options, Units
from biasshift.fisher import UnitFisher
from biasshift.labels import Labels, Likelihood
from biasshift.measuring import measure
from biasshift.probing import Probe, Selection
from biasshift.solving import variances
from biasshift.theory import dot

if TYPE_CHECKING:
    import pandas as pd


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
    """One row per layer: cosines of the gradient, and of two cheap corrections of it, to the unit natural gradient.

    The gradient is that of the mean negative log-likelihood on the probe. Cosines are Euclidean, over the stacked ``(w, w₀)`` of
    all units that are neither dead nor singular. What the centered gradient gains over the plain one is the part of the gap
    that bias shift explains; what the quasi-diagonal one gains beyond that is the scale of the inputs.

    Args:
        x: a tensor of examples with labels ``y``, or an iterable of batches (x, y). The rest as in `unit_fisher`.

    Returns:
        Columns ``layer``, ``cos_gradient``, ``cos_centered``, ``cos_diagonal``, ``norm_ratio`` (‖gradient‖ / ‖unit natural
        gradient‖), ``mean_in_abs`` (the mean of \\|E_p(a)\\| over inputs), ``units`` (in the cosines), ``excluded`` (dead or singular),
        ``effective_samples`` (their median), ``inputs``, ``labels``. Layers without a bias have NaN in ``cos_centered``.

    Raises:
        ValueError: as `unit_fisher`, and when there are no labels.
    """
    import pandas as pd

    options = Options(labels, likelihood, weight_sharing, layers, units, damping, batch_size, generator)
    measured = measure(model, x, y, options, gradient=True)
    return pd.DataFrame([{"layer": name, **gap(layer)} for name, layer in measured.items()])


def gap(layer: Measured) -> dict[str, float | str]:
    """The row of one layer."""
    fisher, g, g0 = layer.fisher, layer.g, layer.g0
    assert g is not None
    used = ~(fisher.dead | fisher.singular)
    natural = _stacked(*fisher.natural_gradient(g, g0))[used]
    plain = _stacked(g, g0)[used]
    return {
        "cos_gradient": _cosine(plain, natural),
        "cos_centered": _cosine(_stacked(*centered_gradient(fisher, g, g0))[used], natural) if g0 is not None else float("nan"),
        "cos_diagonal": _cosine(_stacked(*quasi_diagonal_gradient(fisher, g, g0))[used], natural),
        "norm_ratio": (plain.norm() / natural.norm()).item() if used.any() else float("nan"),
        "mean_in_abs": fisher.sums.mean_p.abs().mean().item(),
        "units": int(used.sum()),
        "excluded": int((~used).sum()),
        "effective_samples": fisher.sums.effective_samples[used].median().item() if used.any() else float("nan"),
        "inputs": g.shape[1],
        "labels": fisher.labels,
    }


def centered_gradient(fisher: UnitFisher, g: Tensor, g0: Tensor) -> tuple[Tensor, Tensor]:
    """``Δw = g − g₀ m``, ``Δw₀ = g₀ − mᵀΔw``: the pure correction of bias shift, without any scaling."""
    m = fisher.sums.mean_q
    dw = g - g0[:, None] * m
    return dw, g0 - dot(m, dw)


def quasi_diagonal_gradient(fisher: UnitFisher, g: Tensor, g0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Theorem 1 with the diagonal of V for V (Ollivier 2015); without a bias the diagonal of A."""
    m, c, variance = fisher.sums.mean_q, fisher.sums.mean_delta2[:, None], variances(fisher.sums)
    variance = variance + fisher.damping * variance.mean(1, keepdim=True)
    if g0 is None:
        return g / (c * (variance + m**2)), None
    dw = (g - g0[:, None] * m) / (c * variance)
    return dw, g0 / c[:, 0] - dot(m, dw)


def _stacked(w: Tensor, w0: Tensor | None) -> Tensor:
    return w.double() if w0 is None else torch.cat([w, w0[:, None]], 1).double()


def _cosine(x: Tensor, y: Tensor) -> float:
    if not len(x):
        return float("nan")
    return (dot(x.flatten(), y.flatten()) / (x.norm() * y.norm())).item()
