"""Smaller incoming means, smaller coupling, smaller gap (claim 2), and what Theorem 2's correction does to the mean (claim 3)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from biasshift.judging.claim import EQUAL_STEPS, NO_EXAM, NO_UNITS, Claim, differences, from_exams
from biasshift.judging.evidence import Evidence
from biasshift.judging.points import rank_correlations
from biasshift.judging.statistics import Found, paired

if TYPE_CHECKING:
    import pandas as pd

EXAMINED = (
    ("coupling", "bias and weights are coupled less in ELU networks than in ReLU networks", "Theorem 1", "ln 1/(1−h)", "exam_inflation"),
    ("gap", "ELU's gradient is nearer the unit natural gradient than ReLU's", "section 3",
     "degrees between gradient and unit natural gradient", "exam_gap_degrees"),
)  # fmt: skip
ALONG = (
    ("coupling", "mean", "incoming", "where incoming means are larger, bias and weights are coupled more", "mean |E_p(a)| and h"),
    ("gap", "coupling", "coupling", "where bias and weights are coupled more, the gradient is farther from the unit natural gradient",
     "h and the angle between them"),
)  # fmt: skip
WITHIN = {  # which points are compared → what they have in common
    "layers": ["activation", "step"],
    "steps": ["activation", "layer"],
    "activations": ["step", "layer"],
}
CORRECTION = "Theorem 2's correction makes the effective incoming mean smaller more often than not"
SHARE = "½ − share of units with |μ − k m| < |μ|"
POINTS = "Layers and steps with too few effective samples are left out."
ONE_PROBE = "On one probe at one damping; the sign is the same with h corrected for few samples and at equal loss, where repeated."
TURNS = "The sign changes with the correction of h for few samples, or where it is repeated at equal loss."
NO_CAUSE = "A correlation is no cause."
NO_POINTS = "Too few layers and steps were measured with enough effective samples."


def coupled_less(evidence: Evidence) -> Iterator[Claim]:
    """Claim 2, between ELU and ReLU at equal loss and at equal steps."""
    if not {"elu", "relu"} <= set(evidence.paper["activation"]):
        return
    for name, statement, source, statistic, column in EXAMINED:
        transform = np.log if name == "coupling" else _same
        found, caveat, unsure = from_exams(evidence, lambda rows: differences(rows, column, "elu", "relu", transform))  # noqa: B023
        yield Claim(2, name, name, statement, source, statistic, found, caveat, NO_UNITS, unsure=unsure)
        repeated = [differences(group, column, "elu", "relu", transform) for _, group in _repeats(evidence.exams)]
        corrected = [_over_points(evidence.points, "corrected")] if name == "coupling" else []
        found, unsure = _checked(_over_points(evidence.points, name), -1, [*corrected, *repeated])
        what = "h" if name == "coupling" else statistic
        what, said = f"{what}, mean over measured steps and layers", f"{statement}, at equal steps"
        caveat = f"{EQUAL_STEPS} {POINTS} {TURNS if unsure else ONE_PROBE}"
        yield Claim(2, f"{name}-steps", name, said, source, what, found, caveat, NO_POINTS, unsure=unsure)


def _repeats(exams: "pd.DataFrame") -> Iterator[tuple]:
    return iter(exams.groupby(["exam_probe", "exam_damping"]))


def _checked(effects: "pd.Series", predicted: int, repeated: "list[pd.Series]") -> tuple[Found, bool]:
    """The effect, and whether its sign is another one where it is repeated; repetitions without a number do not count."""
    found = paired(effects, predicted)
    return found, any(float(other.mean()) * found.effect <= 0 for other in repeated)


def _same(x: "pd.Series") -> "pd.Series":
    return x


def _over_points(points: "pd.DataFrame", column: str) -> "pd.Series":
    """ELU minus ReLU over the steps and layers that both have."""
    import pandas as pd

    if not len(points):
        return pd.Series(dtype=float)
    at = points.pivot_table(index=["seed", "step", "layer"], columns="activation", values=column, observed=True)
    if not {"elu", "relu"} <= set(at.columns):
        return pd.Series(dtype=float)
    return (at["elu"] - at["relu"]).dropna().groupby("seed").mean()


def follow_means(evidence: Evidence) -> Iterator[Claim]:
    """Claim 2, as rank correlations within and across layers, steps and activations; one number per seed."""
    for effect, family, cause, statement, of in ALONG:
        for where, common in [*WITHIN.items(), ("all", [])]:
            effects = rank_correlations(evidence.points, cause, effect, common)
            found, unsure = _checked(effects, 1, list(_correlations_repeated(evidence, cause, effect, where)))
            name, scope = f"{family}-{effect}-{where}", f"across {where} alone" if common else "over all layers, steps and activations"
            said, which = f"{statement}, {scope}", "within" if common else "all"
            caveat = f"{NO_CAUSE} {POINTS} {TURNS if unsure else ONE_PROBE}"
            statistic = f"rank correlation of {of}"
            yield Claim(2, name, f"{family}-{effect}-{which}", said, "section 3", statistic, found, caveat, NO_POINTS, 1, unsure)


def _correlations_repeated(evidence: Evidence, cause: str, effect: str, where: str) -> "Iterator[pd.Series]":
    """With h corrected for few samples; and, of h and the gap, at equal loss, on two probes at three dampings."""
    swapped = {"coupling": "corrected"}
    yield rank_correlations(evidence.points, swapped.get(cause, cause), swapped.get(effect, effect), WITHIN.get(where, []))
    if cause == "coupling" and where != "steps":
        common = [name for name in WITHIN.get(where, []) if name != "step"]
        for _, group in _repeats(evidence.exam_points):
            yield rank_correlations(group, cause, effect, common)


def corrected(evidence: Evidence) -> Iterator[Claim]:
    """Claim 3 has no pairs: one half minus the share of units that the correction helps, all activations of a seed together."""
    import pandas as pd

    found, caveat, unsure = from_exams(evidence, lambda rows: 0.5 - rows.groupby("seed")["exam_smaller_share"].mean().dropna())
    missing = NO_UNITS if len(evidence.exams) else NO_EXAM
    yield Claim(3, "correction", "correction", CORRECTION, "Theorem 2", SHARE, found, caveat, missing, unsure=unsure)
    points = evidence.points
    along = 0.5 - points.groupby("seed")["smaller"].mean().dropna() if len(points) else pd.Series(dtype=float)
    repeated = [0.5 - group.groupby("seed")["exam_smaller_share"].mean() for _, group in _repeats(evidence.exams)]
    found, unsure = _checked(along, -1, repeated)
    caveat = f"{EQUAL_STEPS} {POINTS} {TURNS if unsure else ONE_PROBE}"
    said = f"{CORRECTION}, along the runs"
    yield Claim(3, "correction-steps", "correction", said, "Theorem 2", SHARE, found, caveat, NO_POINTS, unsure=unsure)
