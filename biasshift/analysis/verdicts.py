"""All claims, with their families corrected and their verdicts."""

import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.causality import batch_norm_claims, constant_claims, gap_claims
from biasshift.analysis.claims.correlations import correlation_claims
from biasshift.analysis.claims.coupling import correction_claims, coupling_claims
from biasshift.analysis.claims.inheritance import inheritance_claims
from biasshift.analysis.claims.means import drift_claims, mean_claims
from biasshift.analysis.claims.speed import speed_claims
from biasshift.analysis.evidence import Evidence, read_evidence
from biasshift.analysis.grid import RULE
from biasshift.analysis.statistics import (
    FEWEST_SEEDS,
    LEVEL,
    holm,
    name_of_test,
    seeds_needed,
    verdict,
)
from biasshift.progress import Show, progress as shown

QUESTIONS = (
    mean_claims, coupling_claims, correlation_claims, correction_claims, inheritance_claims,
    gap_claims, constant_claims, speed_claims, drift_claims, batch_norm_claims,
)  # fmt: skip
AT_ONE_RATE = (1, 2, 3, 4, 7)  # the numbers of questions about plain gradient descent
COLUMNS = (
    "claim", "statement", "source", "statistic", "effect", "low", "high", "n", "p", "verdict",
    "caveat", "number", "family", "predicted", "test", "p_holm", "p_contrary", "p_holm_all",
)  # fmt: skip


def claims(runs: str | Path | pd.DataFrame, *, progress: Show = None) -> pd.DataFrame:
    """Returns one row per claim of the paper: its effect in these runs, and a verdict.

    1 means of activations, 2 coupling and gradient gap, 3 Theorem 2's correction, 4 inherited bias
    shift, 5 the causal test by updates and by added constants, 6 speed, 7 variance over epochs, 8
    batch normalization; of these, what the runs can speak to.

    Effects are paired by seed (equal initial weights, equal batches). Every claim predicts the sign
    of its effect. The verdict is *supported* when the 95 % t interval over seeds lies on that side
    of 0 and the exact one-sided test agrees after Holm's correction over the variants of the
    statement. It is *not supported* when all this holds of the contrary, else *undecided*. It is
    undecided, too, with fewer than 6 paired seeds, and where what is read off Fisher matrices was
    not repeated on two probes at three dampings with one sign. Pairs without a number count as the
    strongest evidence against: a verdict holds whatever they would have been. Correlations across
    the few activation functions are described, and never decided.

    Runs may differ in activation function, update, constant, batch normalization and learning rate.
    The rates must be the same for all. Claims 1 to 4 and 7 are about plain gradient descent at one
    rate; the others compare every kind of network and update at its own best rate. One rule chooses
    both kinds of rates: `biasshift.analysis.grid.RULE`.

    Args:
        runs: a run folder or a folder of runs, or the table that `biasshift.runs.reader.read_runs`
            returns.
        progress: whether to show on stderr, or in a notebook, how many of the questions are
            answered; by default in a terminal or a notebook after 3 seconds, and not in loops.

    Returns:
        Columns ``claim``, ``statement``, ``source``, ``statistic``, ``effect``, ``low``, ``high``,
        ``n`` (paired seeds), ``p`` (of the exact test), ``verdict``, ``caveat``, ``number`` (1 to
        8), ``family`` (of variants that are corrected together), ``predicted`` (sign of the
        effect), ``test`` (its name and side), ``p_holm`` (corrected within the family: what the
        verdict goes by), ``p_contrary`` (the same of the opposite sign), ``p_holm_all`` (``p``
        corrected over all rows). `biasshift.analysis.statistics` gives the reasons.

    Raises:
        ValueError: if there are no runs, they lack what the claims are made of, are not runs of one
            setting, or have losses below 0.
    """
    if not isinstance(runs, pd.DataFrame | str | os.PathLike):
        raise ValueError(
            "'runs' must be a run folder, a folder of runs, or a table of runs, got "
            f"{type(runs).__name__}."
        )
    evidence = Evidence.of(runs if isinstance(runs, pd.DataFrame) else read_evidence(runs))
    made: list[Claim] = []
    with shown("claims", progress) as bar:
        bar.begin(len(QUESTIONS), "questions")
        for question in QUESTIONS:
            made += question(evidence)
            bar.advance()
    families = defaultdict(list)
    for claim in made:
        families[claim.family].append(claim)
    rows = {}
    for members in families.values():
        p = [claim.estimate.p for claim in members]
        p_holm = holm(p)
        p_contrary = holm([claim.estimate.p_contrary for claim in members])
        variants = sum(value == value for value in p)  # that could be tested
        for i, claim in enumerate(members):
            rows[claim.name] = _row(claim, evidence, variants, p_holm[i], p_contrary[i])
    table = pd.DataFrame([rows[claim.name] for claim in made], columns=list(COLUMNS))
    return table.assign(p_holm_all=holm([claim.estimate.p for claim in made]))


def _row(
    claim: Claim, evidence: Evidence, variants: int, p_holm: float, p_contrary: float
) -> dict[str, Any]:
    estimate, sign = claim.estimate, "<" if claim.predicted < 0 else ">"
    judged = verdict(estimate.low, estimate.high, estimate.n, p_holm, p_contrary, claim.predicted)
    return asdict(estimate) | {
        "claim": claim.name,
        "statement": claim.statement,
        "source": claim.source,
        "statistic": claim.statistic,
        "verdict": judged if claim.decidable else "undecided",
        "caveat": _caveat(claim, evidence, variants),
        "number": claim.number,
        "family": claim.family,
        "predicted": f"{sign} 0",
        "test": f"{name_of_test(estimate.n + estimate.left_out)}, one-sided: effect {sign} 0",
        "p_holm": p_holm,
        "p_contrary": p_contrary,
    }


def _caveat(claim: Claim, evidence: Evidence, variants: int) -> str:
    """The claim's own caveat, between what its pairs and its learning rate add."""
    caveat, n, left_out = claim.caveat, claim.estimate.n, claim.estimate.left_out
    if n == 0:
        return claim.missing
    if claim.number in AT_ONE_RATE and evidence.numbers["lr"].nunique() > 1 and len(evidence.paper):
        caveat += f" At learning rate {evidence.paper['lr'].iloc[0]:g} for all, {RULE}."
    if left_out:
        caveat = (
            f"{left_out} of {n + left_out} pairs have no number, and count against the verdict. "
            f"{caveat}"
        )
    if n < FEWEST_SEEDS:
        return f"Fewer than {FEWEST_SEEDS} paired seeds decide nothing. {caveat}"
    if variants / 2**n >= LEVEL:
        return (
            f"With {n} seeds no p survives the correction for {variants} variants: "
            f"{seeds_needed(variants)} could decide. {caveat}"
        )
    return caveat
