"""Measurements → rows of the one tidy table: (step, layer, unit), with whole-layer values on ``unit = −1``."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biasshift.fisher import UnitFisher
from biasshift.moments import ActivationMoments
from biasshift.shifts import BiasShift

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("step", "layer", "unit")
ACTIVATION_COLUMNS = ("mean", "var")
SHIFT_COLUMNS = ("total", "own", "incoming", "second_order")
FISHER_COLUMNS = (
    "mean_delta2", "s", "k", "k0", "coupling", "effective_samples", "norm_mean_p", "norm_mean_q", "norm_corrected_mean",
)  # fmt: skip
GAP_COLUMNS = ("cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "mean_in_abs")
COLUMNS = (*KEYS, *ACTIVATION_COLUMNS, *SHIFT_COLUMNS, *FISHER_COLUMNS, *GAP_COLUMNS)

Columns = Mapping[str, Tensor]


def activation_columns(moments: ActivationMoments) -> Columns:
    return {"mean": moments.mean, "var": moments.var}


def shift_columns(shift: BiasShift, units: Tensor | None) -> Columns:
    columns = {name: getattr(shift, name) for name in SHIFT_COLUMNS}
    return columns if units is None else {name: x[units.to(x.device)] for name, x in columns.items()}


def fisher_columns(fisher: UnitFisher) -> Columns:
    columns = {name: getattr(fisher, name) for name in FISHER_COLUMNS if not name.startswith("norm_")}
    norm_p = fisher.mean_p.norm(dim=-1).expand_as(fisher.c)
    norms = {"norm_mean_p": norm_p, "norm_mean_q": fisher.mean_q.norm(dim=1), "norm_corrected_mean": fisher.corrected_mean.norm(dim=1)}
    return columns | norms


def unit_rows(step: int, layer: str, columns: Columns, units: Tensor | None = None) -> "pd.DataFrame":
    """One row per unit of a layer; ``units`` are their indices where only some were kept. Waits for the device once."""
    import pandas as pd

    values = torch.stack([x.detach().double() for x in columns.values()]).cpu().numpy()
    index = range(values.shape[1]) if units is None else units.tolist()
    return pd.DataFrame({"step": step, "layer": layer, "unit": list(index), **dict(zip(columns, values, strict=True))})


def layer_row(step: int, layer: str, values: Mapping[str, object]) -> "pd.DataFrame":
    """The row of a whole layer."""
    import pandas as pd

    return pd.DataFrame([{"step": step, "layer": layer, "unit": -1, **{name: values[name] for name in GAP_COLUMNS}}])


def tidy(frames: Iterable["pd.DataFrame"]) -> "pd.DataFrame":
    """All rows under each other, with every column of the table, NaN where a row has no such quantity."""
    import pandas as pd

    filled = [frame.reindex(columns=COLUMNS) for frame in frames]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COLUMNS)
    floats = {name: "float64" for name in COLUMNS if name not in KEYS}
    return table.astype({"step": "int64", "unit": "int64", "layer": "str", **floats})
