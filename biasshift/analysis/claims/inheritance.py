"""The share of the bias shift that units inherit from the layers below, and what it predicts about
learning (claim 4).
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from biasshift.analysis.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_PAIR, Claim, differences
from biasshift.analysis.evidence import Evidence
from biasshift.analysis.layer_points import FEWEST, rank_correlations, residuals
from biasshift.analysis.learning_curves import common_levels, reached
from biasshift.analysis.statistics import paired

SHARE = "Σ|incoming| / Σ(|own| + |incoming| + |second order|)"
STATEMENT = "ELU units inherit a smaller share of their bias shift from below than ReLU units"
SLOWER = "networks that inherit a larger share of their bias shift early learn more slowly"
RANKS = (
    "rank correlation of the share over the first quarter of the run and the steps to a common loss"
)
NO_RANKS = (
    f"Fewer than {FEWEST} activation functions with one seed came down to a common loss, or had "
    "their bias shift measured in the first quarter of the run."
)
NOT_BEFORE = (
    "No two runs with one seed had their bias shift measured before they came down to the equal "
    "loss."
)
FROM_SEEDS = "A correlation is no cause; each activation function's mean over seeds is taken off."
ONE_ORDER = (
    "Across {} activation functions, the same for all seeds, whose order is one observation: "
    "described, not decided."
)


def inheritance_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 4: ELU units inherit a smaller share, and a larger share slows learning.

    The first is a difference between ELU and ReLU, at equal steps and up to equal loss. The second
    is a rank correlation across activation functions, which is described and never decided, and
    from seed to seed of the same activation function.
    """
    if evidence.has("elu", "relu"):
        examined = evidence.paper["exam_step"].notna().any()
        for name, column, statement, caveat, missing in (
            ("inherited", "inherited", STATEMENT, f"{EQUAL_STEPS} Single steps of SGD.", NO_PAIR),
            (
                "inherited-loss",
                "inherited_equal",
                f"{STATEMENT}, up to equal loss",
                f"{EQUAL_LOSS} Up to there, single steps of SGD.",
                NOT_BEFORE if examined else NO_EXAM,
            ),
        ):
            yield Claim(
                number=4,
                name=name,
                family="inherited",
                statement=statement,
                source="section 3",
                statistic=SHARE,
                estimate=paired(differences(evidence.paper, column, "elu", "relu")),
                caveat=caveat,
                missing=missing,
            )
    activations = evidence.paper["activation"].nunique()
    if activations >= FEWEST:
        for name, statement, caveat, residual in (
            ("inherited-forecast", SLOWER, ONE_ORDER.format(activations), False),
            (
                "inherited-forecast-seeds",
                f"{SLOWER}, from seed to seed of the same activation function",
                FROM_SEEDS,
                True,
            ),
        ):
            effects = forecast(evidence, residual).reindex(evidence.seeds())
            yield Claim(
                number=4,
                name=name,
                family=name,
                statement=statement,
                source="section 3",
                statistic=RANKS,
                estimate=paired(effects, predicted=1),
                caveat=caveat,
                missing=NO_RANKS,
                predicted=1,
                decidable=residual,
            )


def forecast(evidence: Evidence, residual: bool = False) -> pd.Series:
    """Returns one rank correlation per seed over its activation functions.

    It is that of the share inherited early and of ln of the steps to the lowest common loss.

    Args:
        evidence: the runs, of which those of the paper's kind count.
        residual: subtract each activation function's mean over seeds before.
    """
    runs = evidence.paper
    curves = [evidence.curves[name] for name in runs["run"]]
    levels = common_levels(curves, 1)
    if not levels:
        return pd.Series(dtype=float)
    points = runs.assign(steps=np.log([reached(curve, levels[0]) for curve in curves]))
    points = residuals(points, ("inherited_early", "steps"), ["activation"]) if residual else points
    return rank_correlations(points, "inherited_early", "steps", [])
