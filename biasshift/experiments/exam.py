"""The examination of a network before anything is claimed from it.

Do the numbers repeat on another probe, and are the identities exact?
"""

import copy

import pandas as pd
import torch
from torch import Tensor, nn

from biasshift import theory
from biasshift.analysis.quantities import SAMPLES_PER_INPUT
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.accumulators import Measured
from biasshift.measure.bias_shift import bias_shift
from biasshift.measure.fisher import measure
from biasshift.measure.options import Options

Probe = tuple[Tensor, Tensor]
Units = dict[str, list[int]]

DAMPINGS = (1e-4, 1e-2, 1.0)  # claims must keep their sign at all of them
RESIDUAL_EXAMPLES = 500  # identities hold on any probe


def examine(
    model: nn.Module, probes: tuple[Probe, Probe], layers: list[str], units: Units, step: int
) -> pd.DataFrame:
    """Returns the statistics of the claims, repeated on two disjoint probes at three dampings.

    There is one row per layer, probe and damping, with columns ``exam_probe``, ``exam_damping``,
    and ``exam_*`` as in `layer_statistics`.

    Args:
        model: Left as found.
        probes: Two disjoint (x, y), on the model's device.
        layers: Names of the weight layers that are examined.
        units: Layer → indices of its units; layers that are missing here are measured whole.
        step: Completed steps, for the column ``step``.
    """
    rows = []
    kept = {name: units[name] for name in layers if name in units}
    for number, (x, y) in enumerate(probes):
        options = Options(layers=layers, units=kept)
        for name, layer in measure(model, x, y, options, True, warn=False).items():
            for damping in DAMPINGS:
                damped = Measured(layer.fisher.damped(damping), layer.g, layer.g0)
                keys = {
                    "step": step,
                    "layer": name,
                    "unit": -1,
                    "exam_probe": number,
                    "exam_damping": damping,
                }
                statistics = layer_statistics(damped)
                rows.append(keys | {f"exam_{key}": value for key, value in statistics.items()})
    return pd.DataFrame(rows)


def layer_statistics(layer: Measured) -> dict[str, float]:
    """Returns one number per quantity of a layer, from its units with enough effective samples.

    These are medians over those units; ``smaller_share`` and ``enough`` are shares, and
    ``gap_degrees`` is the angle between the gradient and the unit natural gradient of all those
    units together. Where no unit has enough samples, they are NaN but for ``enough`` and
    ``effective_samples``.

    Args:
        layer: With its gradient, at the damping of its unit Fisher matrices.
    """
    fisher = layer.fisher
    sums, inputs = fisher.sums, fisher.mean_q.shape[1]
    enough = fisher.effective_samples >= SAMPLES_PER_INPUT * inputs
    smaller = fisher.corrected_mean.norm(dim=1) < fisher.mean_p.norm(dim=-1)
    return {
        # 1/(1 − h) without cancellation
        "inflation": _median((fisher.s.double() * fisher.c.double())[enough]),
        "k": _median(fisher.k[enough]),
        "smaller_share": smaller[enough].double().mean().item() if enough.any() else float("nan"),
        "gap_degrees": _gap_degrees(layer, enough),
        "enough": enough.double().mean().item(),
        "effective_samples": _median(sums.effective_samples),
        "mean_in_abs": sums.mean_p.abs().mean().item() if enough.any() else float("nan"),
    }


def _gap_degrees(layer: Measured, units: Tensor) -> float:
    g, g0 = layer.g, layer.g0
    assert g is not None and g0 is not None
    natural, natural0 = layer.fisher.natural_gradient(g, g0)
    assert natural0 is not None
    units = units & ~layer.fisher.singular
    plain, natural = (
        torch.cat([w, w0[:, None]], 1)[units].double().flatten()
        for w, w0 in ((g, g0), (natural, natural0))
    )
    cosine = theory.dot(plain, natural) / (plain.norm() * natural.norm())
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).item()


def _median(x: Tensor) -> float:
    # nanmedian takes the lower one of two in the middle
    return x.double().nanquantile(0.5).item() if len(x) else float("nan")


def residuals(model: nn.Module, probe: Probe, units: Units, step: int) -> pd.DataFrame:
    """Returns how far the exact identities are from exact, in float64 and relative.

    There is one row for the whole network, with the worst layer's value in each column:

    * ``residual_theorem1``: the centered against the block form of the unit natural gradient;
    * ``residual_identity``: ``mᵀΔw + Δw₀ = g₀/c``;
    * ``residual_theorem2``: Theorem 2 against the shift of the update itself;
    * ``residual_bookkeeping``: own + incoming + second order against the measured shift.

    Args:
        model: Left as found: a copy in float64 is measured.
        probe: (x, y), of which the first 500 examples are taken.
        units: Layer → indices of its units; layers that are missing here are measured whole.
        step: Completed steps, for the column ``step``.
    """
    x, y = (part[:RESIDUAL_EXAMPLES] for part in probe)
    twin = copy.deepcopy(model).double()
    options = Options(damping=1e-3, units=units)
    measured = measure(twin, x.double(), y, options, gradient=True, warn=False)
    layers = [_identities(layer) for layer in measured.values()]
    row = {"step": step, "layer": "", "unit": -1}
    row |= {f"residual_{key}": max(layer[key] for layer in layers) for key in layers[0]}
    row["residual_bookkeeping"] = _bookkeeping(twin, x.double(), y)
    return pd.DataFrame([row])


def _identities(layer: Measured) -> dict[str, float]:
    """Worst relative residuals over the usable units of a layer.

    The block form gets the matrices whose V is damped.
    """
    fisher, g, g0 = layer.fisher, layer.g, layer.g0
    assert g is not None and g0 is not None
    update = fisher.natural_gradient(g, g0)
    assert update[1] is not None
    ok = ~(fisher.dead | fisher.singular | fisher.bias_inert)
    c, m, g, g0 = fisher.c[ok], fisher.mean_q[ok], g[ok], g0[ok]
    A, b = _damped_blocks(fisher, ok)
    dw, dw0 = update[0][ok], update[1][ok]
    block_dw, block_dw0 = theory.natural_gradient_blocks(A, b, c, g, g0)
    parts = theory.dot(m, dw).abs() + dw0.abs()
    return {
        "theorem1": _worst(
            (dw - block_dw).norm(dim=1) + (dw0 - block_dw0).abs(), dw.norm(dim=1) + dw0.abs()
        ),
        "identity": _worst(theory.dot(m, dw) + dw0 - g0 / c, parts),
        "theorem2": _worst(
            theory.theorem2_shift(A, b, c, fisher.mean_p, g, g0)
            - theory.bias_shift(fisher.mean_p, dw, dw0),
            theory.dot(fisher.mean_p.abs().expand_as(dw), dw.abs()) + dw0.abs(),
        ),
    }


def _damped_blocks(fisher: UnitFisher, units: Tensor) -> tuple[Tensor, Tensor]:
    """``A = c (V_λ + m mᵀ)``, ``b = c m``: the block form of the damped centered inverse."""
    c, m = fisher.c[units], fisher.mean_q[units]
    V = theory.damp(fisher.var_q[units], fisher.damping)
    return c[:, None, None] * (V + m[:, :, None] * m[:, None, :]), c[:, None] * m


def _bookkeeping(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Worst residual of the parts of the bias shift, over all layers of one gradient step."""
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with bias_shift(model, x) as shift, torch.no_grad():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p -= 0.1 * gradient
    return max(
        _worst(
            s.total - s.own - s.incoming - s.second_order,
            s.own.abs() + s.incoming.abs() + s.second_order.abs(),
        )
        for s in shift.values()
    )


def _worst(residual: Tensor, scale: Tensor) -> float:
    """The largest residual against the layer's own scale; 0 where there are no units."""
    if not len(residual):
        return 0.0
    # NaN counts as infinitely far off, or a maximum might pass over it.
    return (residual.abs().max() / scale.max()).nan_to_num(nan=torch.inf).item()
