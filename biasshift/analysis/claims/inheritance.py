"""The share of the bias shift that units inherit from the layers below, and what it says about
learning (claim 4).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from biasshift.analysis.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_PAIR, Claim, differences
from biasshift.analysis.evidence import Evidence
from biasshift.analysis.layer_points import FEWEST, rank_correlations, residuals
from biasshift.analysis.learning_curves import common_levels, reached
from biasshift.analysis.statistics import paired

if TYPE_CHECKING:
    import pandas as pd

SHARE = "Σ|incoming| / Σ(|own| + |incoming| + |second order|)"
STATEMENT = "ELU units inherit a smaller share of their bias shift from below than ReLU units"
SLOWER = "networks that inherit a larger share of their bias shift early learn more slowly"
NO_RANKS = (
    f"Fewer than {FEWEST} activation functions with one seed came down to a common loss, or had "
    "their bias shift measured in the first "
    "quarter of the run."
)
NOT_BEFORE = "No two runs with one seed had their bias shift measured before they came down to the equal loss."
FROM_SEEDS = "A correlation is no cause; each activation function's mean over seeds is taken off."
ONE_ORDER = "Across {} activation functions, the same for all seeds, whose order is one observation: described, not decided."


def inherited_less(evidence: Evidence) -> Iterator[Claim]:
    """Claim 4: between ELU and ReLU, and as a forecast of learning across activation functions."""
    if {"elu", "relu"} <= set(evidence.paper["activation"]):
        found = paired(differences(evidence.paper, "inherited", "elu", "relu"))
        yield Claim(
            4,
            "inherited",
            "inherited",
            STATEMENT,
            "section 3",
            SHARE,
            found,
            f"{EQUAL_STEPS} Single steps of SGD.",
            NO_PAIR,
        )
        found = paired(differences(evidence.paper, "inherited_equal", "elu", "relu"))
        said, caveat = (
            f"{STATEMENT}, up to equal loss",
            f"{EQUAL_LOSS} Up to there, single steps of SGD.",
        )
        missing = NOT_BEFORE if evidence.paper["exam_step"].notna().any() else NO_EXAM
        yield Claim(
            4, "inherited-loss", "inherited", said, "section 3", SHARE, found, caveat, missing
        )
    if evidence.paper["activation"].nunique() >= FEWEST:
        found = paired(forecast(evidence).reindex(evidence.seeds()), predicted=1)
        statistic = "rank correlation of the share over the first quarter of the run and the steps to a common loss"
        caveat = ONE_ORDER.format(evidence.paper["activation"].nunique())
        yield Claim(
            4,
            "inherited-forecast",
            "inherited-forecast",
            SLOWER,
            "section 3",
            statistic,
            found,
            caveat,
            NO_RANKS,
            1,
            unsure=True,
        )
        found = paired(forecast(evidence, residual=True).reindex(evidence.seeds()), predicted=1)
        said = f"{SLOWER}, from seed to seed of the same activation function"
        yield Claim(
            4,
            "inherited-forecast-seeds",
            "inherited-forecast-seeds",
            said,
            "section 3",
            statistic,
            found,
            FROM_SEEDS,
            NO_RANKS,
            1,
        )


def forecast(evidence: Evidence, residual: bool = False) -> "pd.Series":
    """One rank correlation per seed, over its activation functions; of residuals: with each
    activation's mean over seeds taken off.
    """
    import pandas as pd

    runs = evidence.paper
    levels = common_levels([evidence.curves[name] for name in runs["run"]], 1)
    if not levels:
        return pd.Series(dtype=float)
    points = runs.assign(
        steps=np.log([reached(evidence.curves[name], levels[0]) for name in runs["run"]])
    )
    points = residuals(points, ("inherited_early", "steps"), ["activation"]) if residual else points
    return rank_correlations(points, "inherited_early", "steps", [])
