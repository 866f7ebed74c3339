"""What a figure consists of: the runs it is about, a small table, panels, and numbers beside the
paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from biasshift.figures.selection import MEASURED

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure


NOTHING = "–"  # that could stand beside a number
NONE_PRINTED = "prints none"


class Number(NamedTuple):
    """A number that a figure shows, and what the paper says."""

    quantity: str
    here: str
    paper: str = NOTHING


@dataclass(frozen=True)
class Drawing:
    """A figure: runs → a small table → panels. The small table is all that the panels and the
    numbers look at.
    """

    title: str
    runs: str  # the command that makes them
    paper: str  # what the paper's own figure shows
    condense: Callable[[pd.DataFrame], pd.DataFrame]
    panels: Callable[[pd.DataFrame], Figure]
    numbers: Callable[[pd.DataFrame], list[Number]]
    experiments: tuple[str, ...] = ()  # of whose runs it is: the first that is there
    prefer: Mapping[str, object] = field(
        default_factory=dict
    )  # settings of the runs, where there are such
    quick: tuple[str, ...] = ()  # commands that train a shortened version
    apart: tuple[str, ...] = ()  # options of runs that it tells apart, besides activation and seed
    unshown: tuple[str, ...] = MEASURED  # those that what it shows does not depend on
    shown: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: (
        table
    )  # the part of the small table that is drawn
    fits: Callable[[pd.DataFrame], bool] = lambda table: (
        True
    )  # whether the paper's numbers are of such runs


def finals(
    table: pd.DataFrame,
    column: str,
    paper: Mapping[str, str] | str,
    name: str,
    percent: bool = False,
) -> list[Number]:
    """The last value of a column in every run: mean ± SD over the seeds of every activation
    function.

    Args:
        paper: what the paper says, of all of them or of each.
    """
    from biasshift.analysis.formatting import mean_and_sd
    from biasshift.plots import looks

    rows = table.loc[table[column].notna()].sort_values("step").drop_duplicates("run", keep="last")
    found = []
    for key, look in looks(rows["activation"].unique()).items():
        values = rows.loc[rows["activation"] == key, column].astype(float)
        text = f"{mean_and_sd(100 * values if percent else values)}{' %' if percent else ''} (n = {len(values)})"
        found.append(
            Number(
                f"{name}, {look.label}",
                text,
                paper if isinstance(paper, str) else paper.get(str(key), NOTHING),
            )
        )
    return found
