"""What a figure consists of: the runs it is about, a small table, panels, and numbers beside the paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure


class Number(NamedTuple):
    """A number that a figure shows, and what the paper says."""

    quantity: str
    here: str
    paper: str = "–"


@dataclass(frozen=True)
class Drawing:
    """A figure: runs → a small table → panels. The small table is all that the panels and the numbers look at."""

    title: str
    runs: str  # the command that makes them
    paper: str  # what the paper's own figure shows
    condense: Callable[[pd.DataFrame], pd.DataFrame]
    panels: Callable[[pd.DataFrame], Figure]
    numbers: Callable[[pd.DataFrame], list[Number]]
    experiments: tuple[str, ...] = ()  # of whose runs it is: the first that is there
    prefer: Mapping[str, object] = field(default_factory=dict)  # settings of the runs, where there are such
    quick: tuple[str, ...] = ()  # commands that train a shortened version


def finals(table: pd.DataFrame, column: str, paper: Mapping[str, str], name: str, percent: bool = False) -> list[Number]:
    """The last value of a column in every run: mean ± SD over the seeds of every activation function."""
    from biasshift.plots import looks
    from biasshift.summary import mean_and_sd

    rows = table.loc[table[column].notna()].sort_values("step").drop_duplicates("run", keep="last")
    found = []
    for key, look in looks(rows["activation"].unique()).items():
        values = rows.loc[rows["activation"] == key, column].astype(float)
        text = f"{mean_and_sd(100 * values if percent else values)}{' %' if percent else ''} (n = {len(values)})"
        found.append(Number(f"{name}, {look.label}", text, paper.get(str(key), "–")))
    return found
