"""What was measured, as people read it: a table of units, a median with its range, a page."""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def unit_table(columns: Mapping[str, Tensor]) -> "pd.DataFrame":
    """Returns a row per unit: its number, and a column per tensor (units,).

    Numbers become float64; flags stay flags.
    """
    import pandas as pd

    values = {name: _numpy(x) for name, x in columns.items()}
    length = max((len(x) for x in values.values()), default=0)
    return pd.DataFrame({"unit": range(length), **values})


def median_and_range(x: Tensor) -> list[float]:
    """Returns the median, the least and the largest of the numbers that are there; [] of none."""
    known = x.detach().double()[~x.detach().isnan()]
    return torch.stack([known.median(), known.min(), known.max()]).tolist() if len(known) else []


def middle(x: Tensor) -> str:
    """Returns the median and the range of some numbers: "0.2 (-0.1 to 0.9)"; "–" of none."""
    numbers = median_and_range(x)
    return "{:.3g} ({:.3g} to {:.3g})".format(*numbers) if numbers else "–"


def page(title: str, rows: Mapping[str, Mapping[str, Any]], *notes: str) -> str:
    """Returns an HTML table below a title: a row per name, a column per key of the first row.

    Args:
        title: text, not escaped yet, as all that the rows and the notes hold.
        rows: name of a row → heading of a column → cell.
        notes: paragraphs between the title and the table.
    """
    columns = ["", *next(iter(rows.values()), ())]
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells.values())
        + "</tr>"
        for name, cells in rows.items()
    )
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in notes)
    return (
        f"<div><p><code>{html.escape(title)}</code></p>{paragraphs}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numpy(x: Tensor) -> Any:
    return (x.detach() if x.dtype == torch.bool else x.detach().double()).cpu().numpy()
