"""Measured layers as people read them: a line, a notebook's table, a DataFrame per unit."""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def unit_table(columns: Mapping[str, Tensor]) -> "pd.DataFrame":
    """Returns a row per unit: its number, and a column per tensor (units,)."""
    import pandas as pd

    values = {name: x.detach().double().cpu().numpy() for name, x in columns.items()}
    length = max((len(x) for x in values.values()), default=0)
    return pd.DataFrame({"unit": range(length), **values})


def middle(x: Tensor) -> str:
    """Returns the median and the range of some numbers: "0.2 (-0.1 to 0.9)"; "–" of none."""
    known = x.detach().double()[~x.detach().isnan()]
    if not len(known):
        return "–"
    median, least, most = torch.stack([known.median(), known.min(), known.max()]).tolist()
    return f"{median:.3g} ({least:.3g} to {most:.3g})"


def page(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns an HTML table with a title: a row per name, and a column per key of the first row."""
    head = "".join(
        f"<th>{html.escape(str(key))}</th>" for key in ("", *next(iter(rows.values()), ()))
    )
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells.values())
        + "</tr>"
        for name, cells in rows.items()
    )
    return (
        f"<div><p><code>{html.escape(title)}</code></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
