"""One claim with what was found about it, before its verdict; the wording that claims share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from biasshift.judging.evidence import Evidence
from biasshift.judging.statistics import Found, paired

if TYPE_CHECKING:
    import pandas as pd

EQUAL_STEPS = "At equal steps, not at equal loss."
EQUAL_LOSS = "At equal training loss."
REPEATED = "At equal training loss; the sign is the same on two disjoint probes and at dampings 1e-4, 1e-2 and 1."
SIGN_CHANGES = "At equal training loss; the sign changes with the damping or the probe."
NO_PAIR = "No two runs with one seed reached their last epoch."
NO_EXAM = "No two runs with one seed came down to the equal loss."
NO_UNITS = "No two runs with one seed came down to the equal loss with enough effective samples."


@dataclass(frozen=True)
class Claim:
    """A statement with a direction, and the effect that these runs show.

    ``predicted`` is the sign that the statement predicts for the effect. Claims of one ``family`` are one statement with its
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
    unsure: bool = False  # its sign changes with the damping or the probe


def differences(numbers: "pd.DataFrame", column: str, first: str, second: str, transform: Callable = lambda x: x) -> "pd.Series":
    """First minus second activation function, seed by seed."""
    by_seed = numbers.set_index("seed")
    one, other = (by_seed.loc[(by_seed["activation"] == name).to_numpy(), column] for name in (first, second))
    return (transform(one.astype(float)) - transform(other.astype(float))).dropna()


def from_exams(evidence: Evidence, effect: Callable[["pd.DataFrame"], "pd.Series"]) -> tuple[Found, str, bool]:
    """An effect at equal loss, its caveat, and whether its sign changes: repeated on two probes and at three dampings."""
    found = paired(effect(evidence.paper))
    repeated = [float(effect(group).mean()) for _, group in evidence.exams.groupby(["exam_probe", "exam_damping"])]
    unsure = not all(mean * found.effect > 0 for mean in repeated)
    return found, SIGN_CHANGES if unsure else REPEATED, unsure
