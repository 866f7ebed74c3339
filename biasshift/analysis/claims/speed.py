"""Who learns faster (claim 6): steps to given losses, and the loss at the end, each at its best
learning rate.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from biasshift.analysis.claim import NO_EXAM, NO_PAIR, Claim
from biasshift.analysis.evidence import AT_THE_END, Evidence
from biasshift.analysis.grid import NAMES, RULE, Cell
from biasshift.analysis.statistics import paired

FASTER = "ELU networks learn faster than {} networks"
LOWER = "ELU networks end at a lower training loss than {} networks"
FIGURE = "section 4.1, Figure 2b"
BETWEEN = "Between two scores the logarithm of the loss is a straight line."
NO_LEVEL = "No loss was reached by all runs."
NEVER = (
    "In {} pairs one run never came down there and counts with its last step, which understates "
    "the difference."
)


def describe_rates(evidence: Evidence, cells: list[Cell]) -> str:
    """Returns the sentence about the learning rates that cells are compared at.

    It warns where the best rate of a cell is at the edge of those tried.
    """
    if evidence.numbers["lr"].nunique() < 2:
        return "One learning rate for all."
    best = evidence.best(cells)
    chosen = ", ".join(
        f"{runs['lr'].iloc[0]:g} for {cell.name}" for cell, runs in best.items() if len(runs)
    )
    edges = evidence.edges(cells)
    warning = f" At the edge of the rates tried: {', '.join(edges)}." if edges else ""
    return f"Each at its best learning rate ({chosen}), {RULE}.{warning}"


def speed_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 6: ELU networks learn faster than those of every other activation function.

    By the steps to the equal loss of the examination, by the steps to the lowest losses that both
    reach, and by the loss at the end.
    """
    for activation in ("relu", "lrelu", "srelu"):
        cells = [Cell("elu"), Cell(activation)]
        if set(cells) <= evidence.cells:
            yield from _against(evidence, activation, cells)


def _against(evidence: Evidence, activation: str, cells: list[Cell]) -> Iterator[Claim]:
    rates, (elu, other) = describe_rates(evidence, cells), cells
    suffix = "" if activation == "relu" else f"-{activation}"
    family, statement = f"speed{suffix}", FASTER.format(NAMES[activation])
    best = evidence.best(cells)
    effects, never = later(best[elu], best[other])
    yield Claim(
        number=6,
        name=family,
        family=family,
        statement=statement,
        source=FIGURE,
        statistic="ln of the steps to equal training loss",
        estimate=paired(effects),
        caveat=f"{NEVER.format(never)} {rates}" if never else rates,
        missing=NO_EXAM,
    )
    for speed in evidence.speeds(cells):
        estimate = paired(speed.table[elu] - speed.table[other])
        if speed.level and not speed.in_time:
            yield Claim(
                number=6,
                name=f"{family}-{speed.level:g}",
                family=family,
                statement=f"{statement}, to training loss {speed.level:g}",
                source=FIGURE,
                statistic=speed.statistic,
                estimate=estimate,
                caveat=f"{rates} {BETWEEN}",
                missing=NO_LEVEL,
            )
        elif speed.statistic == AT_THE_END:
            yield Claim(
                number=6,
                name=f"loss{suffix}",
                family="loss",
                statement=LOWER.format(NAMES[activation]),
                source=FIGURE,
                statistic="ln of the training loss",
                estimate=estimate,
                caveat=f"At equal steps. {rates}",
                missing=NO_PAIR,
            )


def later(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.Series, int]:
    """Returns first minus second in ln of the steps to the equal loss, seed by seed.

    And in how many pairs one run never came down there. NaN where neither came down, or where one
    ended before the other was there.

    Args:
        first, second: runs by seed with ``exam_step`` and ``last_step``.
    """
    seeds = first.index.intersection(second.index)
    first, second = first.loc[seeds], second.loc[seeds]
    a, b = _at_least(first, second), _at_least(second, first)
    never = sum(
        int((steps.notna() & runs["exam_step"].isna()).sum())
        for steps, runs in ((a, first), (b, second))
    )
    return np.log(a) - np.log(b), never


def _at_least(runs: pd.DataFrame, partners: pd.DataFrame) -> pd.Series:
    """The step of the equal loss, or the last one of a run that never came down there although it
    continued when its partner had.
    """
    steps = runs["exam_step"].astype(float)
    continued = runs["last_step"] > partners["exam_step"]
    steps = steps.where(steps.notna() | ~continued, runs["last_step"])
    return steps.where(steps > 0)
