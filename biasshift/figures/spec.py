"""What a figure consists of: runs, a small table of them, panels, and numbers to print."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from biasshift import plots
from biasshift.analysis.formatting import mean_and_sd
from biasshift.figures.selection import MEASURED

NOTHING = "–"  # beside a number that the paper does not have
NONE_PRINTED = "prints none"


class Number(NamedTuple):
    """A number that a figure shows, as text, and what the paper says of the same quantity."""

    quantity: str
    here: str
    paper: str = NOTHING


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """A figure: runs are condensed to a small table, which panels and numbers are made of.

    The panels and the numbers see nothing but the small table. Where there are no runs, one that
    comes with the package draws the figure.

    Attributes:
        title: the first words of the caption.
        command: the command that makes the runs.
        paper: what the paper's own figure shows.
        condense: from the table of runs to the small table.
        panels: from the small table to the figure.
        numbers: from the small table to numbers beside the paper's.
        experiments: those that it may be about; the first of which there are runs is taken.
        prefer: settings of the runs that are taken, wherever some runs have them.
        quick: commands that train a shortened version.
        compared: options of runs that it compares, besides activation and seed.
        irrelevant: options of runs that what it shows does not depend on.
        drawn: from the small table to the part of it that is drawn.
        comparable: whether the paper's numbers are of such runs as the small table's.
    """

    title: str
    command: str = ""
    paper: str = ""
    condense: Callable[[pd.DataFrame], pd.DataFrame]
    panels: Callable[[pd.DataFrame], plots.Figure]
    numbers: Callable[[pd.DataFrame], list[Number]]
    experiments: tuple[str, ...] = ()
    prefer: Mapping[str, object] = field(default_factory=dict)
    quick: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    irrelevant: tuple[str, ...] = MEASURED
    drawn: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    comparable: Callable[[pd.DataFrame], bool] = lambda table: True


def by_activation(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yields name, label and rows of every activation function, in the order of the paper."""
    for name, look in plots.looks(table["activation"].unique()).items():
        yield name, look.label, table.loc[table["activation"] == name]


def final_values(
    table: pd.DataFrame,
    column: str,
    paper: Mapping[str, str] | str,
    name: str,
    percent: bool = False,
) -> list[Number]:
    """Returns the last value of a column, mean ± SD over the runs of every activation function.

    Args:
        table: rows with `run`, `step`, `activation` and the column; the last row of a run in which
            the column has a value counts.
        paper: what the paper says, of all activation functions or of each.
        name: what the column is called.
        percent: whether to show fractions as percentages.
    """
    rows = table.loc[table[column].notna()].sort_values("step").drop_duplicates("run", keep="last")
    factor, unit = (100, " %") if percent else (1, "")
    numbers = []
    for activation, label, last in by_activation(rows):
        values = factor * last[column].astype(float)
        here = f"{mean_and_sd(values)}{unit} (n = {len(values)})"
        there = paper if isinstance(paper, str) else paper.get(activation, NOTHING)
        numbers.append(Number(f"{name}, {label}", here, there))
    return numbers
