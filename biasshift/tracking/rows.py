"""Measurements → rows of the one tidy table: (step, layer, unit), with whole-layer values on ``unit
= −1``.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biasshift import theory
from biasshift.fisher.cholesky import variances
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.activation_moments import ActivationMoments
from biasshift.measure.bias_shift import BiasShift

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("step", "layer", "unit")
ACTIVATION_COLUMNS = ("mean", "var")
SHIFT_COLUMNS = ("total", "own", "incoming", "second_order")
FISHER_COLUMNS = (
    "mean_delta2", "s", "k", "k0", "coupling", "effective_samples", "norm_mean_p", "norm_mean_q", "norm_corrected_mean",
)  # fmt: skip
GAP_COLUMNS = ("cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "mean_in_abs")
# Behind the columns that code outside relies on: unit rows of "fisher", unit rows of "gap" (both
# lines), layer rows of "gap".
MORE_FISHER_COLUMNS = ("coupling_corrected", "norm_cov_p", "cov_distance")
UPDATE_COLUMNS = (
    "shift_gradient",
    "shift_centered",
    "shift_natural",
)  # of the gradient that the measured step used, at size 1
OWN_COLUMNS = ("own_gradient", "own_centered", "own_natural")  # the same at the length of the step
MORE_GAP_COLUMNS = ("norm_ratio_centered", "norm_ratio_diagonal", "gap_explained")
MORE_COLUMNS = (*MORE_FISHER_COLUMNS, *UPDATE_COLUMNS, *MORE_GAP_COLUMNS, *OWN_COLUMNS)
COLUMNS = (*KEYS, *ACTIVATION_COLUMNS, *SHIFT_COLUMNS, *FISHER_COLUMNS, *GAP_COLUMNS, *MORE_COLUMNS)

Columns = Mapping[str, Tensor]


def activation_columns(moments: ActivationMoments) -> Columns:
    return {"mean": moments.mean, "var": moments.var}


def shift_columns(shift: BiasShift, units: Tensor | None) -> Columns:
    columns = {name: getattr(shift, name) for name in SHIFT_COLUMNS}
    return (
        columns if units is None else {name: x[units.to(x.device)] for name, x in columns.items()}
    )


def fisher_columns(fisher: UnitFisher) -> Columns:
    columns = {
        name: getattr(fisher, name) for name in FISHER_COLUMNS if not name.startswith("norm_")
    }
    norm_p = fisher.mean_p.norm(dim=-1).expand_as(fisher.c)
    norms = {
        "norm_mean_p": norm_p,
        "norm_mean_q": fisher.mean_q.norm(dim=1),
        "norm_corrected_mean": fisher.corrected_mean.norm(dim=1),
    }
    return {**columns, **norms, **_more_fisher_columns(fisher)}


def _more_fisher_columns(fisher: UnitFisher) -> Columns:
    """``norm_cov_p`` is ``|Cov_p(δ², a)|``; ``cov_distance`` how far it is from the zero that makes
    k = 1, free of scales.

    The distance is ``|m − μ| / √tr V``: about ``1/√effective_samples`` by chance alone, where δ²
    and activations are independent. ``coupling_corrected`` is h without the bias of few samples,
    right on average, so that it may be a little below 0.
    """
    spread = variances(fisher.sums).sum(1).sqrt()
    distance = torch.where(spread > 0, fisher.sums.offset_pq.norm(dim=1) / spread, torch.nan)
    raw = fisher.coupling.double() / (1 - fisher.coupling.double())  # mᵀV⁻¹m
    unbiased = theory.hotelling(raw, fisher.sums.effective_samples, fisher.mean_q.shape[1])
    return {
        "coupling_corrected": unbiased / (1 + unbiased),
        "norm_cov_p": fisher.cov_p.norm(dim=1),
        "cov_distance": distance,
    }


def unit_rows(
    step: int, layer: str, columns: Columns, units: Tensor | None = None
) -> "pd.DataFrame":
    """One row per unit of a layer; ``units`` are their indices where only some were kept. Waits for
    the device once.
    """
    import pandas as pd

    values = torch.stack([x.detach().double() for x in columns.values()]).cpu().numpy()
    index = range(values.shape[1]) if units is None else units.tolist()
    return pd.DataFrame(
        {
            "step": step,
            "layer": layer,
            "unit": list(index),
            **dict(zip(columns, values, strict=True)),
        }
    )


def layer_row(step: int, layer: str, values: Mapping[str, object]) -> "pd.DataFrame":
    """The row of a whole layer."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "step": step,
                "layer": layer,
                "unit": -1,
                **{name: values[name] for name in (*GAP_COLUMNS, *MORE_GAP_COLUMNS)},
            }
        ]
    )


def tidy(frames: Iterable["pd.DataFrame"]) -> "pd.DataFrame":
    """All rows under each other, with every column of the table, NaN where a row has no such
    quantity.
    """
    import pandas as pd

    filled = [frame.reindex(columns=COLUMNS) for frame in frames]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COLUMNS)
    floats = {name: "float64" for name in COLUMNS if name not in KEYS}
    return table.astype({"step": "int64", "unit": "int64", "layer": "str", **floats})
