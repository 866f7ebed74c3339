"""Whose mean activations are nearer zero (claim 1), and whose stay where they are (claim 7)."""

from collections.abc import Iterator

import numpy as np

from biasshift.analysis.claim import EQUAL_LOSS, EQUAL_STEPS, NO_EXAM, NO_PAIR, Claim, differences
from biasshift.analysis.evidence import Evidence
from biasshift.analysis.grid import NAMES
from biasshift.analysis.statistics import paired

NEARER = "{}'s mean unit activations are nearer zero than {}'s"
MEDIAN = "|median over units of the mean activation|"
SECTION = "section 3, Figure 2a"
NORMAL = "means on normal net inputs: SReLU .08, ELU .16, LReLU .36, ReLU .40"
PAIRS = (  # name, family, the one that is nearer zero, the other, source
    ("means", "means", "elu", "relu", SECTION),
    ("means-lrelu", "means", "elu", "lrelu", SECTION),
    ("means-lrelu-relu", "means", "lrelu", "relu", SECTION),
    ("means-srelu-elu", "means-srelu", "srelu", "elu", NORMAL),
    ("means-srelu-relu", "means-srelu", "srelu", "relu", NORMAL),
)
CONDITIONS = (  # suffix, column of `per_run`, what the statement adds, caveat, missing
    ("", "unit_mean", "", EQUAL_STEPS, NO_PAIR),
    (
        "-loss",
        "unit_mean_equal",
        " at equal loss, too",
        f"{EQUAL_LOSS} Between two measurements.",
        NO_EXAM,
    ),
)
DRIFTS = (  # name, column of `per_run`, what varies
    ("drift", "drift_units", "of units' mean activations, median over units"),
    ("drift-median", "drift_median", "of their median over units"),
)
MEANS = "Of units' mean activations on the probe, where the paper takes medians over examples."
NO_EPOCHS = (
    "No two runs with one seed reached their last epoch with three measurements of the activations."
)


def mean_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 1: mean unit activations are nearer zero, at equal steps and at equal loss.

    Every pair of activation functions that was trained is compared, and ELU with ReLU unit by unit,
    too.
    """
    for name, family, first, second, source in PAIRS:
        for suffix, column, addition, caveat, missing in CONDITIONS:
            if evidence.has(first, second):
                yield Claim(
                    number=1,
                    name=name + suffix,
                    family=family + suffix,
                    statement=NEARER.format(NAMES[first], NAMES[second]) + addition,
                    source=source,
                    statistic=MEDIAN,
                    estimate=paired(differences(evidence.paper, column, first, second, np.abs)),
                    caveat=caveat,
                    missing=missing,
                )
    if evidence.has("elu", "relu"):
        yield Claim(
            number=1,
            name="means-unitwise",
            family="means-unitwise",
            statement="unit by unit, too, " + NEARER.format("ELU", "ReLU"),
            source="section 3",
            statistic="mean over units of |mean activation|",
            estimate=paired(differences(evidence.paper, "unit_mean_abs", "elu", "relu")),
            caveat=EQUAL_STEPS,
            missing=NO_PAIR,
        )


def drift_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 7, Figure 7: ELU's activations vary less from epoch to epoch than ReLU's.

    The effect is the difference of the logarithms of variances over epochs, after the first one.
    """
    for name, column, what in DRIFTS:
        if evidence.has("elu", "relu"):
            effects = differences(
                evidence.paper, column, "elu", "relu", lambda x: np.log(x.where(x > 0))
            )
            yield Claim(
                number=7,
                name=name,
                family="drift",
                statement="ELU's activations vary less from epoch to epoch than ReLU's",
                source="appendix, Figure 7",
                statistic=f"ln of the variance over epochs, after the first, {what}, "
                "mean over layers",
                estimate=paired(effects),
                caveat=f"{MEANS} {EQUAL_STEPS}",
                missing=NO_EPOCHS,
            )
