"""Where means are larger, is the coupling, and where the coupling is larger, is the gap (claim 2,
as rank correlations)?
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pandas as pd

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.coupling import FEW_SAMPLES, NO_POINTS, ONE_PROBE, POINTS
from biasshift.analysis.evidence import NOT_REPEATED, Condition, Evidence, repeated
from biasshift.analysis.layer_points import rank_correlations, residuals
from biasshift.analysis.statistics import paired

NO_CAUSE = "A correlation is no cause"
ONE_ORDER = (
    f"{NO_CAUSE}, and all seeds repeat the same few activation functions, whose order is one "
    "observation: described, not decided."
)


class Link(NamedTuple):
    """Two columns of points, of which one is said to follow the other."""

    family: str
    cause: str
    effect: str
    statement: str
    statistic: str


class Scope(NamedTuple):
    """Which points are ranked against each other."""

    name: str
    words: str
    along: list[str]  # what they have in common along the run
    examined: list[str] | None  # at equal loss; None: an examination has no such points
    caveat: str
    decides: bool = True
    of_residuals: bool = False  # the mean over seeds of points that agree in these is subtracted


LINKS = (
    Link(
        "mean-coupling",
        "incoming",
        "coupling",
        "where incoming means are larger, bias and weights are coupled more",
        "mean |E_p(a)| and h",
    ),
    Link(
        "coupling-gap",
        "coupling",
        "gap",
        "where bias and weights are coupled more, the gradient is farther from the unit natural "
        "gradient",
        "h and the angle between them",
    ),
)
SCOPES = (
    Scope(
        "seeds",
        "from seed to seed, of the same activation, layer and step",
        ["activation", "step", "layer"],
        ["activation", "layer"],
        f"{NO_CAUSE}; the mean over seeds is taken off, so that depth, time and activation "
        "function cannot make it.",
        of_residuals=True,
    ),
    Scope(
        "layers",
        "across layers alone",
        ["activation", "step"],
        ["activation"],
        f"{NO_CAUSE}: depth may move both.",
    ),
    Scope(
        "steps",
        "across steps alone",
        ["activation", "layer"],
        None,
        f"{NO_CAUSE}: time may move both.",
    ),
    Scope(
        "activations",
        "across activations alone",
        ["step", "layer"],
        ["layer"],
        ONE_ORDER,
        decides=False,
    ),
    Scope("all", "over all layers, steps and activations", [], [], ONE_ORDER, decides=False),
)


def correlation_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 2 as rank correlations, one number per seed.

    Coupling follows incoming means, and the gap follows the coupling: from seed to seed, across
    layers, steps and activations alone, and over all. Across the few activation functions a
    correlation is described, and never decided.
    """
    for link in LINKS:
        for scope in SCOPES:
            effects = _correlations(evidence.points, scope, scope.along, link.cause, link.effect)
            estimate = paired(effects.reindex(evidence.seeds()), predicted=1)
            repetition = _repeated(evidence, link, scope, estimate.effect)
            yield Claim(
                number=2,
                name=f"{link.family}-{scope.name}",
                family=f"{link.family}-{'within' if scope.decides else scope.name}",
                statement=f"{link.statement}, {scope.words}",
                source="section 3",
                statistic=f"rank correlation of {link.statistic}",
                estimate=estimate,
                caveat=f"{scope.caveat} {POINTS} {repetition.sentence}",
                missing=NO_POINTS,
                predicted=1,
                decidable=repetition.holds and scope.decides,
            )


def _correlations(
    points: pd.DataFrame, scope: Scope, common: list[str], cause: str, effect: str
) -> pd.Series:
    if scope.of_residuals and len(points):
        points, common = residuals(points, (cause, effect), common), []
    return rank_correlations(points, cause, effect, common)


def _repeated(evidence: Evidence, link: Link, scope: Scope, expected: float) -> Condition:
    """With h corrected for few samples along the run; at equal loss, on two probes at three
    dampings.
    """
    cause, effect = (
        "corrected" if column == "coupling" else column for column in (link.cause, link.effect)
    )
    corrected = _correlations(evidence.points, scope, scope.along, cause, effect)
    if corrected.mean() * expected < 0:
        return Condition(FEW_SAMPLES, False)
    if scope.examined is None:
        return Condition(f"On one probe at one damping. {NOT_REPEATED}", False)
    effects = partial(
        _correlations, scope=scope, common=scope.examined, cause=link.cause, effect=link.effect
    )
    sentence, holds = repeated(evidence.exam_points, effects, expected)
    return Condition(ONE_PROBE.format(sentence), holds)
