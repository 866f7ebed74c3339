"""Smaller coupling, smaller gap (claim 2, between ELU and ReLU), and what Theorem 2's correction
does to the mean (claim 3).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biasshift.analysis.claim import EQUAL_STEPS, NO_EXAM, NO_UNITS, Claim
from biasshift.analysis.evidence import Evidence, at_equal_losses, repeated
from biasshift.analysis.grid import NAMES
from biasshift.analysis.layer_points import between
from biasshift.analysis.statistics import paired

if TYPE_CHECKING:
    import pandas as pd


CORRECTION = "Theorem 2's correction makes the effective incoming mean smaller more often than not"
SHARE = "½ − share of units with |μ − k m| < |μ|"
POINTS = "Layers and steps with too few effective samples are left out."
ONE_PROBE = "On one probe at one damping; repeated at equal loss: {}"
FEW_SAMPLES = "The sign changes when h is corrected for few samples."
NO_POINTS = "Too few layers and steps were measured with enough effective samples."


class Question(NamedTuple):
    """What is compared between ELU and ReLU."""

    name: str
    statement: str
    source: str
    statistic: str  # at equal loss
    along: str  # at equal steps
    transform: Callable

    def at_loss(self, points: "pd.DataFrame") -> "pd.Series":
        """ELU minus ReLU in the examinations, seed by seed."""
        return between(points, self.name, ["layer", "exam_probe", "exam_damping"], self.transform)


ANGLE = "degrees between gradient and unit natural gradient"
EXAMINED = (
    Question(
        "coupling",
        "bias and weights are coupled less in ELU networks than in ReLU networks",
        "Theorem 1",
        "ln 1/(1−h)",
        "h",
        np.log,
    ),
    Question(
        "gap",
        "ELU's gradient is nearer the unit natural gradient than ReLU's",
        "section 3",
        ANGLE,
        ANGLE,
        lambda x: x,
    ),
)


def coupled_less(evidence: Evidence) -> Iterator[Claim]:
    """Claim 2, between ELU and ReLU at equal loss and at equal steps."""
    if not {"elu", "relu"} <= set(evidence.paper["activation"]):
        return
    for question in EXAMINED:
        yield _at_equal_loss(evidence, question)
        yield _at_equal_steps(evidence, question)


def _at_equal_loss(evidence: Evidence, question: Question) -> Claim:
    found = paired(question.at_loss(evidence.reference).reindex(evidence.seeds("elu", "relu")))
    losses = at_equal_losses(evidence.reference, "elu", "relu")
    again = repeated(evidence.exam_points, question.at_loss, found.effect)
    caveat = f"{losses.said} {_left_out(evidence.reference, question.name)}{again.said}"
    return Claim(
        2, question.name, question.name, question.statement, question.source, question.statistic, found, caveat, NO_UNITS,
        unsure=not (losses.sure and again.sure),
    )  # fmt: skip


def _at_equal_steps(evidence: Evidence, question: Question) -> Claim:
    name, points, at = question.name, evidence.points, ["step", "layer"]
    found = paired(between(points, name, at).reindex(evidence.seeds("elu", "relu")))
    again = repeated(evidence.exam_points, question.at_loss, found.effect)
    turned = name == "coupling" and bool(between(points, "corrected", at).mean() * found.effect < 0)
    caveat = f"{EQUAL_STEPS} {POINTS} {FEW_SAMPLES if turned else ONE_PROBE.format(again.said)}"
    statistic = f"{question.along}, mean over measured steps and layers"
    return Claim(
        2, f"{name}-steps", name, f"{question.statement}, at equal "
                                  "steps", question.source, statistic, found, caveat, NO_POINTS,
        unsure=turned or not again.sure,
    )  # fmt: skip


def _left_out(points: "pd.DataFrame", column: str) -> str:
    """How many layers of ELU and ReLU networks have no number, in words."""
    layers = (
        points[points["activation"].isin(["elu", "relu"])]
        .groupby(["seed", "activation", "layer"], observed=True)[column]
        .count()
    )
    without = int((layers == 0).sum())
    return (
        f"{without} of {len(layers)} layers have too few effective samples and are left out. "
        if without
        else ""
    )


def corrected(evidence: Evidence) -> Iterator[Claim]:
    """Claim 3 has no pairs: one half minus the share of units that the correction helps, at equal
    loss and along the runs.
    """
    missing = NO_UNITS if len(evidence.exam_points) else NO_EXAM
    trained = [name for name in ("elu", "relu") if (evidence.paper["activation"] == name).any()]
    kinds = [("correction", "correction", CORRECTION, [])]
    kinds += [
        (
            f"correction-{name}",
            "correction-activations",
            f"{CORRECTION} in {NAMES[name]} networks",
            [name],
        )
        for name in trained
    ]
    for name, family, said, activations in kinds:

        def less(points: "pd.DataFrame", activations: list[str] = activations) -> "pd.Series":
            return _half_less(
                points[points["activation"].isin(activations)] if activations else points
            )

        found = paired(less(evidence.reference).reindex(evidence.seeds(*activations)))
        again = repeated(evidence.exam_points, less, found.effect)
        caveat = f"At equal training loss. {again.said}"
        yield Claim(
            3, name, family, said, "Theorem 2", SHARE, found, caveat, missing, unsure=not again.sure
        )
    found = paired(_half_less(evidence.points).reindex(evidence.seeds()))
    again = repeated(evidence.exam_points, _half_less, found.effect)
    caveat = f"{EQUAL_STEPS} {POINTS} {ONE_PROBE.format(again.said)}"
    said = f"{CORRECTION}, along the runs"
    yield Claim(
        3,
        "correction-steps",
        "correction",
        said,
        "Theorem 2",
        SHARE,
        found,
        caveat,
        NO_POINTS,
        unsure=not again.sure,
    )


def _half_less(points: "pd.DataFrame") -> "pd.Series":
    """½ − share of units that the correction helps, seed by seed; units without a corrected mean,
    as those without a bias, do not count.
    """
    import pandas as pd

    return (
        0.5 - points.groupby("seed")["smaller"].mean().dropna()
        if len(points)
        else pd.Series(dtype=float)
    )
