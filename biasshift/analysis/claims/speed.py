"""Who learns faster (claim 6): steps to given losses, and the loss at the end, each at its best
learning rate.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from biasshift.analysis.claim import NO_EXAM, NO_PAIR, Claim
from biasshift.analysis.evidence import AT_THE_END, Evidence
from biasshift.analysis.grid import NAMES, RULE, Cell
from biasshift.analysis.statistics import paired

if TYPE_CHECKING:
    import pandas as pd

FASTER = "ELU networks learn faster than {} networks"
LOWER = "ELU networks end at a lower training loss than {} networks"
FIGURE = "section 4.1, Figure 2b"
LEVELS = 2  # losses that both reach, besides the equal loss of the examination
BETWEEN = "Between two scores the logarithm of the loss is a straight line."
NO_LEVEL = "No loss was reached by all runs."
NEVER = "In {} pairs one run never came down there and counts with its last step, which understates the difference."


def rates_said(evidence: Evidence, cells: list[Cell]) -> str:
    """What claims about speed say about their learning rates."""
    best = evidence.best(cells)
    tried = set(evidence.numbers["lr"])
    if len(tried) < 2:
        return "One learning rate for all."
    chosen = ", ".join(
        f"{runs['lr'].iloc[0]:g} for {cell.name}" for cell, runs in best.items() if len(runs)
    )
    edges = evidence.edges(cells)
    warning = f" At the edge of the rates tried: {', '.join(edges)}." if edges else ""
    return f"Each at its best learning rate ({chosen}), {RULE}.{warning}"


def faster(evidence: Evidence) -> Iterator[Claim]:
    """Claim 6, ELU against every other activation function."""
    for other in ("relu", "lrelu", "srelu"):
        cells = [Cell("elu"), Cell(other)]
        if set(cells) <= evidence.cells:
            yield from _against(evidence, other, cells)


def later(first: "pd.DataFrame", second: "pd.DataFrame") -> "tuple[pd.Series, int]":
    """First minus second in ln of the steps to the equal loss, seed by seed; and in how many pairs
    one run never came down there.

    NaN where neither came down, or where one ended before the other was there.
    """
    seeds = first.index.intersection(second.index)
    first, second = first.loc[seeds], second.loc[seeds]
    one, other = _at_least(first, second), _at_least(second, first)
    never = sum(
        int((steps.notna() & runs["exam_step"].isna()).sum())
        for steps, runs in ((one, first), (other, second))
    )
    return np.log(one) - np.log(other), never


def _at_least(runs: "pd.DataFrame", others: "pd.DataFrame") -> "pd.Series":
    """The step of the equal loss, or the last one of a run that never came down there although it
    went on when its partner had.
    """
    steps = runs["exam_step"].astype(float)
    steps = steps.where(
        steps.notna() | ~(runs["last_step"] > others["exam_step"]), runs["last_step"]
    )
    return steps.where(steps > 0)


def _against(evidence: Evidence, other: str, cells: list[Cell]) -> Iterator[Claim]:
    rates, (elu, theirs) = rates_said(evidence, cells), cells
    family = "speed" if other == "relu" else f"speed-{other}"
    best = evidence.best(cells)
    effects, never = later(best[elu], best[theirs])
    said, caveat = FASTER.format(NAMES[other]), f"{NEVER.format(never)} {rates}" if never else rates
    yield Claim(
        6,
        family,
        family,
        said,
        FIGURE,
        "ln of the steps to equal training loss",
        paired(effects),
        caveat,
        NO_EXAM,
    )
    speeds = evidence.speeds(cells, LEVELS)
    for statistic, table in speeds.items():
        level = statistic.rpartition(" ")[2]
        found = paired(table[elu] - table[theirs])
        if "steps to training loss" in statistic:
            yield Claim(
                6,
                f"{family}-{level}",
                family,
                f"{said}, to training loss {level}",
                FIGURE,
                statistic,
                found,
                f"{rates} {BETWEEN}",
                NO_LEVEL,
            )
        elif statistic == AT_THE_END:
            name = "loss" if other == "relu" else f"loss-{other}"
            caveat = f"At equal steps. {rates}"
            yield Claim(
                6,
                name,
                "loss",
                LOWER.format(NAMES[other]),
                FIGURE,
                "ln of the training loss",
                found,
                caveat,
                NO_PAIR,
            )
