"""Whose mean activations are nearer zero (claim 1), and whose stay where they are (claim 7)."""

from collections.abc import Iterator

import numpy as np

from biasshift.analysis.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_PAIR, Claim, differences
from biasshift.analysis.evidence import Evidence
from biasshift.analysis.grid import NAMES
from biasshift.analysis.statistics import paired

NEARER = "{}'s mean unit activations are nearer zero than {}'s"
MEDIAN = "|median over units of the mean activation|"
ORDER = (("elu", "relu"), ("elu", "lrelu"), ("lrelu", "relu"))
SECTION = "section 3, Figure 2a"
NORMAL = "means on normal net inputs: SReLU .08, ELU .16, LReLU .36, ReLU .40"
FIGURE_7 = "appendix, Figure 7"
STEADIER = "ln of the variance over epochs, after the first, {}"
MEANS = "Of units' mean activations on the probe, where the paper takes medians over examples. "
NO_EPOCHS = (
    "No two runs with one seed reached their last epoch with three measurements of the activations."
)


def nearer_zero(evidence: Evidence) -> Iterator[Claim]:
    """Claim 1, at equal steps and at equal loss."""
    known = set(evidence.paper["activation"])
    for first, second in ORDER:
        if {first, second} <= known:
            name = (
                "means"
                if (first, second) == ORDER[0]
                else f"means-{second}"
                if first == "elu"
                else f"means-{first}-{second}"
            )
            yield from _both(evidence, name, "means", first, second, SECTION)
    for second in ("elu", "relu"):
        if {"srelu", second} <= known:
            yield from _both(
                evidence, f"means-srelu-{second}", "means-srelu", "srelu", second, NORMAL
            )
    if {"elu", "relu"} <= known:
        statement = "unit by unit, too, " + NEARER.format("ELU", "ReLU")
        found = paired(differences(evidence.paper, "unit_mean_abs", "elu", "relu"))
        yield Claim(
            1,
            "means-unitwise",
            "means-unitwise",
            statement,
            "section 3",
            "mean over units of |mean activation|",
            found,
            EQUAL_STEPS,
            NO_PAIR,
        )


def _both(
    evidence: Evidence, name: str, family: str, first: str, second: str, source: str
) -> Iterator[Claim]:
    statement = NEARER.format(NAMES[first], NAMES[second])
    found = paired(differences(evidence.paper, "unit_mean", first, second, np.abs))
    yield Claim(1, name, family, statement, source, MEDIAN, found, EQUAL_STEPS, NO_PAIR)
    found = paired(differences(evidence.paper, "unit_mean_equal", first, second, np.abs))
    caveat = f"{EQUAL_LOSS} Between two measurements."
    yield Claim(
        1,
        f"{name}-loss",
        f"{family}-loss",
        f"{statement} at equal loss, too",
        source,
        MEDIAN,
        found,
        caveat,
        NO_EXAM,
    )


def steadier(evidence: Evidence) -> Iterator[Claim]:
    """Claim 7: Figure 7."""
    if not {"elu", "relu"} <= set(evidence.paper["activation"]):
        return
    statement = "ELU's activations vary less from epoch to epoch than ReLU's"
    for column, what in (
        ("drift_units", "of units' mean activations, median over units"),
        ("drift_median", "of their median over units"),
    ):
        effects = differences(
            evidence.paper, column, "elu", "relu", lambda x: np.log(x.where(x > 0))
        )
        name = "drift" if column == "drift_units" else "drift-median"
        statistic = STEADIER.format(what) + ", mean over layers"
        yield Claim(
            7,
            name,
            "drift",
            statement,
            FIGURE_7,
            statistic,
            paired(effects),
            MEANS + EQUAL_STEPS,
            NO_EPOCHS,
        )
