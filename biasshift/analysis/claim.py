"""One claim with its estimate, before its verdict; the caveats and the effect that claims share."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from biasshift.analysis.statistics import Estimate

EQUAL_STEPS = "At equal steps, not at equal loss."
EQUAL_LOSS = "At equal training loss."
NO_PAIR = "No two runs with one seed reached their last epoch."
NO_EXAM = "No two runs with one seed came down to the equal loss."
NO_UNITS = "No two runs with one seed came down to the equal loss with enough effective samples."


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that predicts the sign of an effect, and the estimate of that effect.

    Claims of one ``family`` are one statement with its variants: their p values are corrected
    together.
    """

    number: int  # of the question it belongs to, 1 to 8
    name: str
    family: str
    statement: str
    source: str  # in the paper
    statistic: str
    estimate: Estimate
    caveat: str
    missing: str  # why there is no pair, in place of the caveat
    predicted: int = -1  # the sign of the effect
    decidable: bool = True  # False: undecided whatever the tests show; the caveat gives the reason


def differences(
    numbers: pd.DataFrame, column: str, first: str, second: str, transform: Callable = lambda x: x
) -> pd.Series:
    """Returns first minus second activation function for every seed that both were trained with.

    Args:
        numbers: one row per run, with ``activation`` and ``seed``.
        column: the number to compare; NaN where one of the two runs has none.
        transform: applied to the column of each before the subtraction.
    """
    by_seed = numbers.set_index("seed")
    a, b = (
        by_seed.loc[(by_seed["activation"] == name).to_numpy(), column].astype(float)
        for name in (first, second)
    )
    seeds = a.index.intersection(b.index)
    return transform(a.loc[seeds]) - transform(b.loc[seeds])
