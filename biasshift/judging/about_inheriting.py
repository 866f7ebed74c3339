"""The share of the bias shift that units inherit from the layers below, and what it says about learning (claim 4)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from biasshift.judging.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_PAIR, Claim, differences
from biasshift.judging.curves import common_levels, reached
from biasshift.judging.evidence import Evidence
from biasshift.judging.points import FEWEST, correlation_of_ranks
from biasshift.judging.statistics import paired

if TYPE_CHECKING:
    import pandas as pd

SHARE = "Σ|incoming| / Σ(|own| + |incoming| + |second order|)"
STATEMENT = "ELU units inherit a smaller share of their bias shift from below than ReLU units"
SLOWER = "networks that inherit a larger share of their bias shift early learn more slowly"
NO_RANKS = f"Fewer than {FEWEST} activation functions with one seed came down to a common loss."


def inherited_less(evidence: Evidence) -> Iterator[Claim]:
    """Claim 4: between ELU and ReLU, and as a forecast of learning across activation functions."""
    if {"elu", "relu"} <= set(evidence.paper["activation"]):
        found = paired(differences(evidence.paper, "inherited", "elu", "relu"))
        yield Claim(4, "inherited", "inherited", STATEMENT, "section 3", SHARE, found, f"{EQUAL_STEPS} Single steps of SGD.", NO_PAIR)
        found, caveat = (
            paired(differences(evidence.paper, "inherited_equal", "elu", "relu")),
            f"{EQUAL_LOSS} Up to there, single steps of SGD.",
        )
        said = f"{STATEMENT}, up to equal loss"
        yield Claim(4, "inherited-loss", "inherited", said, "section 3", SHARE, found, caveat, NO_EXAM)
    if evidence.paper["activation"].nunique() >= FEWEST:
        found = paired(forecast(evidence), predicted=1)
        statistic = "rank correlation of the share over the first quarter of the run and the steps to a common loss"
        caveat = f"Across {evidence.paper['activation'].nunique()} activation functions: a correlation, no cause."
        yield Claim(4, "inherited-forecast", "inherited-forecast", SLOWER, "section 3", statistic, found, caveat, NO_RANKS, 1)


def forecast(evidence: Evidence) -> "pd.Series":
    """One rank correlation per seed, over its activation functions."""
    import pandas as pd

    runs = evidence.paper
    levels = common_levels([evidence.curves[name] for name in runs["run"]], 1)
    if not levels:
        return pd.Series(dtype=float)
    steps = [reached(evidence.curves[name], levels[0]) for name in runs["run"]]
    found = {}
    for seed, some in runs.assign(steps=steps).groupby("seed"):
        both = some[["inherited_early", "steps"]].dropna().to_numpy(float)
        found[seed] = correlation_of_ranks(*both.T)
    return pd.Series(found, dtype=float)
