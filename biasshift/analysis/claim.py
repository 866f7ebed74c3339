"""One claim with what was found about it, before its verdict; the wording and the effect that
claims share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from biasshift.analysis.statistics import Found

if TYPE_CHECKING:
    import pandas as pd

EQUAL_STEPS = "At equal steps, not at equal loss."
EQUAL_LOSS = "At equal training loss."
NO_PAIR = "No two runs with one seed reached their last epoch."
NO_EXAM = "No two runs with one seed came down to the equal loss."
NO_UNITS = "No two runs with one seed came down to the equal loss with enough effective samples."


@dataclass(frozen=True)
class Claim:
    """A statement with a direction, and the effect that these runs show.

    ``predicted`` is the sign that the statement predicts for the effect. Claims of one ``family``
    are one statement with its
    variants: their p values are corrected together.
    """

    number: int  # of the question it belongs to
    name: str
    family: str
    statement: str
    source: str
    statistic: str
    found: Found
    caveat: str
    missing: str  # why there is no pair, said in place of the caveat
    predicted: int = -1
    unsure: bool = False  # undecided whatever the tests say, for a reason that the caveat gives


def differences(
    numbers: "pd.DataFrame", column: str, first: str, second: str, transform: Callable = lambda x: x
) -> "pd.Series":
    """First minus second activation function, for every seed that both were trained with; NaN where
    one of them has no number.
    """
    by_seed = numbers.set_index("seed")
    one, other = (
        by_seed.loc[(by_seed["activation"] == name).to_numpy(), column].astype(float)
        for name in (first, second)
    )
    seeds = one.index.intersection(other.index)
    return transform(one.loc[seeds]) - transform(other.loc[seeds])
