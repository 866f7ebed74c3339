"""The rows of a log as named numbers: one for each layer and quantity, which loggers take."""

import re
from collections.abc import Callable, Mapping

import pandas as pd

from biasshift.distributed import rank

Receiver = Callable[[pd.DataFrame], None]
Send = Callable[[int, Mapping[str, float]], object]  # of a step
KEYS = ("step", "layer", "unit", "kind")
_NAMELESS = re.compile(r"[^\w\-. /]")  # all loggers take what is left


def layer_scalars(table: pd.DataFrame, prefix: str = "biasshift") -> dict[int, dict[str, float]]:
    """Returns the numbers of every layer by step: ``{step: {"biasshift/layer/column": value}}``.

    A value of a whole layer is itself; of the units it is the median, and of ``reliable`` the share
    of units. Numbers that are not finite are left out.

    Args:
        table: Of a log of `biasshift.instrument`, compact or not.
        prefix: What the names begin with.

    Raises:
        ValueError: When it is not a table with columns ``step``, ``layer`` and ``unit``.
    """
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"'table' must be a DataFrame, got {type(table).__name__}. Give the table of a log."
        )
    if not {*KEYS[:3]} <= {*table}:
        raise ValueError(
            f"'table' must have the columns step, layer and unit, got {', '.join(table)}. Give the "
            "table of a log."
        )
    values = table.drop(columns=[key for key in KEYS if key in table])
    by_layer = values.groupby([table["step"], table["layer"]], sort=False)
    medians = by_layer.median()
    if "reliable" in medians:
        medians["reliable"] = by_layer["reliable"].mean()
    scalars: dict[int, dict[str, float]] = {int(step): {} for step in table["step"].unique()}
    for (step, layer), row in zip(medians.index, medians.to_dict("records"), strict=True):
        layer = _NAMELESS.sub("_", str(layer)) or "model"
        scalars[int(step)] |= {
            f"{prefix}/{layer}/{column}": float(value)
            for column, value in row.items()
            if abs(value) < float("inf")
        }
    return scalars


def receiver(send: Send, prefix: str = "biasshift") -> Receiver:
    """Returns what sends the numbers of every layer on; of several processes the first one does.

    Args:
        send: Called with each step and its numbers by name.
        prefix: What the names begin with.
    """

    def receive(rows: pd.DataFrame) -> None:
        if rank() == 0:
            for step, values in layer_scalars(rows, prefix).items():
                send(step, values)

    return receive
