"""Smaller coupling, smaller gap (claim 2, between ELU and ReLU), and what Theorem 2's correction does to the mean (claim 3)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from biasshift.cells import NAMES
from biasshift.judging.claim import EQUAL_STEPS, NO_EXAM, NO_UNITS, Claim
from biasshift.judging.evidence import Evidence
from biasshift.judging.points import between
from biasshift.judging.repeating import at_equal_losses, repeated
from biasshift.judging.statistics import paired

if TYPE_CHECKING:
    import pandas as pd

EXAMINED = (  # name, statement, source, statistic at equal loss, along the run
    ("coupling", "bias and weights are coupled less in ELU networks than in ReLU networks", "Theorem 1", "ln 1/(1−h)", "h"),
    ("gap", "ELU's gradient is nearer the unit natural gradient than ReLU's", "section 3",
     "degrees between gradient and unit natural gradient", "degrees between gradient and unit natural gradient"),
)  # fmt: skip
AT_LOSS = ["layer", "exam_probe", "exam_damping"]
CORRECTION = "Theorem 2's correction makes the effective incoming mean smaller more often than not"
SHARE = "½ − share of units with |μ − k m| < |μ|"
POINTS = "Layers and steps with too few effective samples are left out."
ONE_PROBE = "On one probe at one damping; repeated at equal loss: {}"
FEW_SAMPLES = "The sign changes when h is corrected for few samples."
NO_POINTS = "Too few layers and steps were measured with enough effective samples."


def coupled_less(evidence: Evidence) -> Iterator[Claim]:
    """Claim 2, between ELU and ReLU at equal loss and at equal steps."""
    seeds = evidence.seeds("elu", "relu")
    if not {"elu", "relu"} <= set(evidence.paper["activation"]):
        return
    for name, statement, source, statistic, measured in EXAMINED:

        def at_loss(points: "pd.DataFrame", name: str = name) -> "pd.Series":
            return between(points, name, AT_LOSS, np.log if name == "coupling" else _same)

        found, losses = paired(at_loss(evidence.reference).reindex(seeds)), at_equal_losses(evidence.reference, "elu", "relu")
        again = repeated(evidence.exam_points, at_loss, found.effect)
        caveat = f"{losses.said} {_left_out(evidence.reference, name)}{again.said}"
        unsure = not (losses.sure and again.sure)
        yield Claim(2, name, name, statement, source, statistic, found, caveat, NO_UNITS, unsure=unsure)
        yield _at_equal_steps(evidence, name, statement, source, measured, at_loss, seeds)


def _at_equal_steps(evidence, name, statement, source, measured, at_loss, seeds) -> Claim:
    points = evidence.points
    found = paired(between(points, name, ["step", "layer"]).reindex(seeds))
    again = repeated(evidence.exam_points, at_loss, found.effect)
    turned = name == "coupling" and bool(between(points, "corrected", ["step", "layer"]).mean() * found.effect < 0)
    caveat = f"{EQUAL_STEPS} {POINTS} {FEW_SAMPLES if turned else ONE_PROBE.format(again.said)}"
    statistic = f"{measured}, mean over measured steps and layers"
    return Claim(
        2, f"{name}-steps", name, f"{statement}, at equal steps", source, statistic, found, caveat, NO_POINTS,
        unsure=turned or not again.sure,
    )  # fmt: skip


def _left_out(points: "pd.DataFrame", column: str) -> str:
    """How many layers of ELU and ReLU networks have no number, in words."""
    layers = points[points["activation"].isin(["elu", "relu"])].groupby(["seed", "activation", "layer"], observed=True)[column].count()
    without = int((layers == 0).sum())
    return f"{without} of {len(layers)} layers have too few effective samples and are left out. " if without else ""


def _same(x: "pd.DataFrame") -> "pd.DataFrame":
    return x


def corrected(evidence: Evidence) -> Iterator[Claim]:
    """Claim 3 has no pairs: one half minus the share of units that the correction helps, at equal loss and along the runs."""
    missing = NO_UNITS if len(evidence.exam_points) else NO_EXAM
    kinds = [("", "", "")]
    kinds += [(f"-{name}", name, f" in {NAMES[name]} networks") for name in ("elu", "relu") if (evidence.paper["activation"] == name).any()]
    for suffix, activation, where in kinds:

        def less(points: "pd.DataFrame", activation: str = activation) -> "pd.Series":
            return _half_less(points[points["activation"] == activation] if activation and len(points) else points)

        found = paired(less(evidence.reference).reindex(evidence.seeds(*[activation] * bool(activation))))
        again = repeated(evidence.exam_points, less, found.effect)
        name, said = f"correction{suffix}", f"{CORRECTION}{where}"
        family = "correction-activations" if activation else "correction"
        caveat = f"At equal training loss. {again.said}"
        yield Claim(3, name, family, said, "Theorem 2", SHARE, found, caveat, missing, unsure=not again.sure)
    found = paired(_half_less(evidence.points).reindex(evidence.seeds()))
    again = repeated(evidence.exam_points, _half_less, found.effect)
    caveat = f"{EQUAL_STEPS} {POINTS} {ONE_PROBE.format(again.said)}"
    said = f"{CORRECTION}, along the runs"
    yield Claim(3, "correction-steps", "correction", said, "Theorem 2", SHARE, found, caveat, NO_POINTS, unsure=not again.sure)


def _half_less(points: "pd.DataFrame") -> "pd.Series":
    """½ − share of units that the correction helps, seed by seed; units without a corrected mean, as those without a bias, do not count."""
    import pandas as pd

    return 0.5 - points.groupby("seed")["smaller"].mean().dropna() if len(points) else pd.Series(dtype=float)
