"""Smaller coupling, smaller gap (claim 2, between ELU and ReLU), and what Theorem 2's correction
does to the mean (claim 3).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from biasshift.analysis.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_UNITS, Claim
from biasshift.analysis.evidence import Evidence, at_equal_losses, repeated
from biasshift.analysis.grid import NAMES
from biasshift.analysis.layer_points import elu_minus_relu
from biasshift.analysis.statistics import paired

CORRECTION = "Theorem 2's correction makes the effective incoming mean smaller more often than not"
ANGLE = "degrees between gradient and unit natural gradient"
POINTS = "Layers and steps with too few effective samples are left out."
ONE_PROBE = "On one probe at one damping; repeated at equal loss: {}"
FEW_SAMPLES = "The sign changes when h is corrected for few samples."
NO_POINTS = "Too few layers and steps were measured with enough effective samples."


class Quantity(NamedTuple):
    """What is compared between ELU and ReLU, layer by layer."""

    name: str  # a column of points, and the name of its claim
    statement: str
    source: str
    at_loss: str  # the statistic at equal loss
    at_steps: str  # and at equal steps
    transform: Callable

    def difference(self, points: pd.DataFrame) -> pd.Series:
        """Returns ELU minus ReLU in the examinations, seed by seed."""
        at = ["layer", "exam_probe", "exam_damping"]
        return elu_minus_relu(points, self.name, at, self.transform)


QUANTITIES = (
    Quantity(
        "coupling",
        "bias and weights are coupled less in ELU networks than in ReLU networks",
        "Theorem 1",
        "ln 1/(1−h)",
        "h",
        np.log,
    ),
    Quantity(
        "gap",
        "ELU's gradient is nearer the unit natural gradient than ReLU's",
        "section 3",
        ANGLE,
        ANGLE,
        lambda x: x,
    ),
)


def coupling_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 2: coupling and gradient gap are smaller in ELU networks than in ReLU networks.

    Each at equal loss and at equal steps. Either is decided only where the effect at equal loss
    keeps its sign on two probes at three dampings.
    """
    for quantity in QUANTITIES:
        if evidence.has("elu", "relu"):
            yield _at_equal_loss(evidence, quantity)
            yield _at_equal_steps(evidence, quantity)


def _at_equal_loss(evidence: Evidence, quantity: Quantity) -> Claim:
    points = evidence.reference
    estimate = paired(quantity.difference(points).reindex(evidence.seeds("elu", "relu")))
    losses = at_equal_losses(points, "elu", "relu")
    repetition = repeated(evidence.exam_points, quantity.difference, estimate.effect)
    return Claim(
        number=2,
        name=quantity.name,
        family=quantity.name,
        statement=quantity.statement,
        source=quantity.source,
        statistic=quantity.at_loss,
        estimate=estimate,
        caveat=f"{losses.sentence} {_left_out(points, quantity.name)}{repetition.sentence}",
        missing=NO_UNITS,
        decidable=losses.holds and repetition.holds,
    )


def _at_equal_steps(evidence: Evidence, quantity: Quantity) -> Claim:
    points, at = evidence.points, ["step", "layer"]
    effects = elu_minus_relu(points, quantity.name, at).reindex(evidence.seeds("elu", "relu"))
    estimate = paired(effects)
    repetition = repeated(evidence.exam_points, quantity.difference, estimate.effect)
    # Few samples make a coupling where there is none.
    spurious = quantity.name == "coupling" and bool(
        elu_minus_relu(points, "corrected", at).mean() * estimate.effect < 0
    )
    reason = FEW_SAMPLES if spurious else ONE_PROBE.format(repetition.sentence)
    return Claim(
        number=2,
        name=f"{quantity.name}-steps",
        family=quantity.name,
        statement=f"{quantity.statement}, at equal steps",
        source=quantity.source,
        statistic=f"{quantity.at_steps}, mean over measured steps and layers",
        estimate=estimate,
        caveat=f"{EQUAL_STEPS} {POINTS} {reason}",
        missing=NO_POINTS,
        decidable=repetition.holds and not spurious,
    )


def _left_out(points: pd.DataFrame, column: str) -> str:
    """How many layers of ELU and ReLU networks have no number, in words."""
    pairs = points[points["activation"].isin(["elu", "relu"])]
    counts = pairs.groupby(["seed", "activation", "layer"], observed=True)[column].count()
    if not (empty := int((counts == 0).sum())):
        return ""
    return f"{empty} of {len(counts)} layers have too few effective samples and are left out. "


def correction_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 3: Theorem 2's correction makes the effective incoming mean smaller.

    There are no pairs: the effect is one half minus the share of units that the correction helps,
    at equal loss (all together, in ELU and in ReLU networks) and along the runs.
    """
    at_loss = {
        "points": evidence.reference,
        "caveat": f"{EQUAL_LOSS} {{}}",
        "missing": NO_UNITS if len(evidence.exam_points) else NO_EXAM,
    }
    yield _correction(evidence, **at_loss)
    for activation in filter(evidence.has, ("elu", "relu")):
        yield _correction(evidence, activation, f" in {NAMES[activation]} networks", **at_loss)
    yield _correction(
        evidence,
        where=", along the runs",
        suffix="-steps",
        points=evidence.points,
        caveat=f"{EQUAL_STEPS} {POINTS} {ONE_PROBE}",
        missing=NO_POINTS,
    )


def _correction(
    evidence: Evidence,
    activation: str = "",
    where: str = "",
    suffix: str = "",
    *,
    points: pd.DataFrame,
    caveat: str,
    missing: str,
) -> Claim:
    """Of the networks of one activation function, or of all."""
    activations = [activation] if activation else []

    def effects(points: pd.DataFrame) -> pd.Series:
        if activation:
            points = points[points["activation"] == activation]
        if not len(points):
            return pd.Series(dtype=float)
        # Units without a corrected mean, as those without a bias, do not count.
        return 0.5 - points.groupby("seed")["smaller"].mean().dropna()

    estimate = paired(effects(points).reindex(evidence.seeds(*activations)))
    repetition = repeated(evidence.exam_points, effects, estimate.effect)
    return Claim(
        number=3,
        name="-".join(["correction", *activations]) + suffix,
        family="correction-activations" if activation else "correction",
        statement=CORRECTION + where,
        source="Theorem 2",
        statistic="½ − share of units with |μ − k m| < |μ|",
        estimate=estimate,
        caveat=caveat.format(repetition.sentence),
        missing=missing,
        decidable=repetition.holds,
    )
