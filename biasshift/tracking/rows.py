"""Measurements as rows of the tidy table: (step, layer, unit), whole layers on ``unit = −1``."""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor

from biasshift import theory
from biasshift.fisher.cholesky import variances
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.activation_moments import ActivationMoments
from biasshift.measure.bias_shift import BiasShift
from biasshift.restoration import alone

KEYS = ("step", "layer", "unit")
ACTIVATION_COLUMNS = ("mean", "var")
SHIFT_COLUMNS = ("total", "own", "incoming", "second_order")
FISHER_VALUES = ("mean_delta2", "s", "k", "k0", "coupling", "effective_samples")
FISHER_COLUMNS = (*FISHER_VALUES, "norm_mean_p", "norm_mean_q", "norm_corrected_mean")
GAP_COLUMNS = ("cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "mean_in_abs")
# Behind the columns that code outside relies on: unit rows of "fisher", unit rows of "gap" (two
# sets, of the gradient that the measured step used: at size 1, and at the length of the step), and
# layer rows of "gap".
MORE_FISHER_COLUMNS = ("coupling_corrected", "norm_cov_p", "cov_distance")
UPDATE_COLUMNS = ("shift_gradient", "shift_centered", "shift_natural")
OWN_COLUMNS = ("own_gradient", "own_centered", "own_natural")
MORE_GAP_COLUMNS = ("norm_ratio_centered", "norm_ratio_diagonal", "gap_explained")
TRUST_COLUMNS = ("reliable",)  # unit rows of "fisher": 1 where s, k and h can carry a claim, else 0
MORE_COLUMNS = (
    *MORE_FISHER_COLUMNS,
    *UPDATE_COLUMNS,
    *MORE_GAP_COLUMNS,
    *OWN_COLUMNS,
    *TRUST_COLUMNS,
)
COLUMNS = (*KEYS, *ACTIVATION_COLUMNS, *SHIFT_COLUMNS, *FISHER_COLUMNS, *GAP_COLUMNS, *MORE_COLUMNS)

Columns = Mapping[str, Tensor]  # (units,) each


def activation_columns(moments: ActivationMoments) -> Columns:
    """Returns the mean and the variance of every unit of an activation module.

    Both are over examples and positions, (units,) each, in the precision of the activations.
    """
    return {"mean": moments.mean, "var": moments.var}


def shift_columns(shift: BiasShift, units: Tensor | None) -> Columns:
    """Returns the bias shift and its three parts, (units,) each.

    ``total = own + incoming + second_order``. With ``units``, the indices of some units, only
    those rows are kept.
    """
    columns = {name: getattr(shift, name) for name in SHIFT_COLUMNS}
    if units is None:
        return columns
    return {name: x[units.to(x.device)] for name, x in columns.items()}


def fisher_columns(fisher: UnitFisher) -> Columns:
    """Returns what a unit Fisher matrix says of every unit.

    ``norm_cov_p`` is ``|Cov_p(δ², a)|``; ``cov_distance`` is how far that is from the zero that
    makes k = 1, free of scales: ``|m − μ| / √tr V``. By chance alone, where δ² and activations are
    independent, it is about ``1/√effective_samples``. ``coupling_corrected`` is h without the bias
    of few samples, right on average, so that it may be a little below 0. ``reliable`` is 1 for a
    unit that is `UnitFisher.reliable`, else 0.
    """
    spread = variances(fisher.sums).sum(1).sqrt()
    raw = fisher.coupling.double() / (1 - fisher.coupling.double())  # mᵀV⁻¹m
    unbiased = theory.hotelling(raw, fisher.sums.effective_samples, fisher.mean_q.shape[1])
    return {
        **{name: getattr(fisher, name) for name in FISHER_VALUES},
        "norm_mean_p": fisher.mean_p.norm(dim=-1).expand_as(fisher.c),
        "norm_mean_q": fisher.mean_q.norm(dim=1),
        "norm_corrected_mean": fisher.corrected_mean.norm(dim=1),
        "coupling_corrected": unbiased / (1 + unbiased),
        "norm_cov_p": fisher.cov_p.norm(dim=1),
        "cov_distance": torch.where(
            spread > 0, fisher.sums.offset_pq.norm(dim=1) / spread, torch.nan
        ),
        "reliable": fisher.reliable,
    }


def unit_rows(step: int, layer: str, columns: Columns, units: Tensor | None = None) -> pd.DataFrame:
    """Returns one row per unit of a layer, and waits for the device once.

    Args:
        step: How many optimizer steps were completed.
        layer: The module's name.
        columns: Values by column, (units,) each.
        units: The indices of the units, where only some were kept.
    """
    values = torch.stack([x.detach().double() for x in columns.values()]).cpu().numpy()
    keys = {
        "step": step,
        "layer": layer,
        "unit": list(range(values.shape[1])) if units is None else units.tolist(),
    }
    return pd.DataFrame({**keys, **dict(zip(columns, values, strict=True))})


def layer_row(step: int, layer: str, values: Mapping[str, object]) -> pd.DataFrame:
    """Returns the row of a whole layer, on ``unit = −1``.

    Args:
        step: How many optimizer steps were completed.
        layer: The module's name.
        values: What `biasshift.measure.gradient_gap.gap` returns of the layer.
    """
    gaps = {name: values[name] for name in (*GAP_COLUMNS, *MORE_GAP_COLUMNS)}
    return pd.DataFrame([{"step": step, "layer": layer, "unit": -1, **gaps}])


def tidy(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Returns all rows under each other, with every column of the table.

    ``step`` and ``unit`` are int64, ``layer`` is text. All else is float64, NaN where a row has no
    such quantity.
    """
    frames = list(frames)
    with alone():  # pandas sets warning filters meanwhile, which belong to the process
        filled = [frame.reindex(columns=COLUMNS) for frame in frames]
        table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COLUMNS)
        floats = {name: "float64" for name in COLUMNS if name not in KEYS}
        return table.astype({"step": "int64", "unit": "int64", "layer": "str", **floats})
