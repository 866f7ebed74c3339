"""What is asked of a network before anything is claimed from it: are the identities exact, do the
numbers repeat?
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biasshift import theory
from biasshift.analysis.per_run import SAMPLES_PER_INPUT
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.bias_shift import bias_shift
from biasshift.measure.fisher import measure
from biasshift.measure.options import Measured, Options

if TYPE_CHECKING:
    import pandas as pd

Probe = tuple[Tensor, Tensor]
Units = dict[str, list[int]]

DAMPINGS = (1e-4, 1e-2, 1.0)  # claims must keep their sign at all of them
RESIDUAL_EXAMPLES = 500  # identities hold on any probe


def examine(
    model: nn.Module, probes: tuple[Probe, Probe], layers: list[str], units: Units, step: int
) -> "pd.DataFrame":
    """The statistics of the claims, repeated on two disjoint probes at three dampings.

    One row per layer, probe and damping, with columns ``exam_probe``, ``exam_damping``, and
    ``exam_*`` as in `layer_statistics`.
    """
    import pandas as pd

    rows = []
    for number, (x, y) in enumerate(probes):
        kept = {name: units[name] for name in layers if name in units}
        for name, layer in measure(
            model, x, y, Options(layers=layers, units=kept), gradient=True
        ).items():
            for damping in DAMPINGS:
                damped = Measured(layer.fisher.damped(damping), layer.g, layer.g0)
                keys = {
                    "step": step,
                    "layer": name,
                    "unit": -1,
                    "exam_probe": number,
                    "exam_damping": damping,
                }
                rows.append(
                    keys | {f"exam_{key}": value for key, value in layer_statistics(damped).items()}
                )
    return pd.DataFrame(rows)


def layer_statistics(layer: Measured) -> dict[str, float]:
    """One number per quantity of a layer, from its units with enough effective samples; NaN where
    there are none.

    Medians over those units; ``smaller_share`` and ``enough`` are shares, and ``gap_degrees`` is
    the angle between the gradient and the unit natural gradient of all those units together.
    """
    fisher = layer.fisher
    sums, inputs = fisher.sums, fisher.mean_q.shape[1]
    enough = fisher.effective_samples >= SAMPLES_PER_INPUT * inputs
    smaller = fisher.corrected_mean.norm(dim=1) < fisher.mean_p.norm(dim=-1)
    return {
        "inflation": _median(
            (fisher.s.double() * fisher.c.double())[enough]
        ),  # 1/(1 − h) without cancellation
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
    return (
        x.double().nanquantile(0.5).item() if len(x) else float("nan")
    )  # nanmedian takes the lower one of two in the middle


def residuals(model: nn.Module, probe: Probe, units: Units, step: int) -> "pd.DataFrame":
    """How far the exact identities are from exact, in float64: one whole-network row with
    ``residual_*`` columns, relative.

    ``residual_theorem1``: centered against block form; ``residual_identity``: ``mᵀΔw + Δw₀ =
    g₀/c``; ``residual_theorem2``: Theorem 2 against the shift of the update itself;
    ``residual_bookkeeping``: own + incoming + second order against the measured shift.
    """
    import pandas as pd

    x, y = (part[:RESIDUAL_EXAMPLES] for part in probe)
    twin = copy.deepcopy(model).double()
    measured = measure(twin, x.double(), y, Options(damping=1e-3, units=units), gradient=True)
    worst = [_identities(layer) for layer in measured.values()]
    columns = {f"residual_{key}": max(row[key] for row in worst) for key in worst[0]}
    return pd.DataFrame(
        [
            {
                "step": step,
                "layer": "",
                "unit": -1,
                **columns,
                "residual_bookkeeping": _bookkeeping(twin, x.double(), y),
            }
        ]
    )


def _identities(layer: Measured) -> dict[str, float]:
    """Worst relative residual over the usable units of a layer. The block form gets the matrices
    whose V is damped.
    """
    fisher, g, g0 = layer.fisher, layer.g, layer.g0
    assert g is not None and g0 is not None
    update = fisher.natural_gradient(g, g0)
    assert update[1] is not None
    ok = ~(fisher.dead | fisher.singular)
    c, m, g, g0 = fisher.c[ok], fisher.mean_q[ok], g[ok], g0[ok]
    A, b = damped_blocks(fisher, ok)
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


def damped_blocks(fisher: UnitFisher, units: Tensor) -> tuple[Tensor, Tensor]:
    """``A = c (V_λ + m mᵀ)`` and ``b = c m``: the block form whose inverse is the damped centered
    one.
    """
    c, m = fisher.c[units], fisher.mean_q[units]
    V = theory.damp(fisher.var_q[units], fisher.damping)
    return c[:, None, None] * (V + m[:, :, None] * m[:, None, :]), c[:, None] * m


def _bookkeeping(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """One step of gradient descent on a copy, taken apart: worst residual of the four parts over
    all layers.
    """
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with bias_shift(model, x) as shift, torch.no_grad():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p -= 0.1 * gradient
    found = [
        (
            s.total - s.own - s.incoming - s.second_order,
            s.own.abs() + s.incoming.abs() + s.second_order.abs(),
        )
        for s in shift.values()
    ]
    return max(_worst(residual, scale) for residual, scale in found)


def _worst(residual: Tensor, scale: Tensor) -> float:
    """The largest residual against the layer's own scale; NaN counts as infinitely far off, or a
    maximum might pass over it.
    """
    return (
        (residual.abs().max() / scale.max()).nan_to_num(nan=torch.inf).item()
        if len(residual)
        else 0.0
    )
