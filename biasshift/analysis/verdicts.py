"""All claims, with their families corrected and their verdicts."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.causality import (
    against_batch_norm,
    closes_the_gap,
    slowed_by_a_constant,
)
from biasshift.analysis.claims.correlations import follow_means
from biasshift.analysis.claims.coupling import corrected, coupled_less
from biasshift.analysis.claims.inheritance import inherited_less
from biasshift.analysis.claims.means import nearer_zero, steadier
from biasshift.analysis.claims.speed import faster
from biasshift.analysis.evidence import Evidence
from biasshift.analysis.grid import RULE
from biasshift.analysis.statistics import FEWEST_SEEDS, LEVEL, holm, seeds_needed, verdict
from biasshift.runs.reader import read_runs

if TYPE_CHECKING:
    import pandas as pd

QUESTIONS = (
    nearer_zero, coupled_less, follow_means, corrected, inherited_less,
    closes_the_gap, slowed_by_a_constant, faster, steadier, against_batch_norm,
)  # fmt: skip
AT_ONE_RATE = (1, 2, 3, 4, 7)
COLUMNS = (
    "claim", "statement", "source", "statistic", "effect", "low", "high", "n", "p", "verdict", "caveat",
    "number", "family", "predicted", "test", "p_holm", "p_contrary", "p_holm_all",
)  # fmt: skip


def judged(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per claim; see `biasshift.analysis.verdicts.claims`."""
    import pandas as pd

    evidence = Evidence.of(table)
    found = [_with_rate(claim, evidence) for question in QUESTIONS for claim in question(evidence)]
    over_all = holm([claim.found.p for claim in found])
    rows: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(claim.family for claim in found):
        members = [claim for claim in found if claim.family == family]
        tests = zip(
            holm([claim.found.p for claim in members]),
            holm([claim.found.p_contrary for claim in members]),
            strict=True,
        )
        made = sum(claim.found.p == claim.found.p for claim in members)
        rows |= {claim.name: _row(claim, made, *p) for claim, p in zip(members, tests, strict=True)}
    for claim, p in zip(found, over_all, strict=True):
        rows[claim.name]["p_holm_all"] = p
    return pd.DataFrame([rows[claim.name] for claim in found], columns=list(COLUMNS))


def _with_rate(claim: Claim, evidence: Evidence) -> Claim:
    """Where several learning rates were tried, claims about plain runs say which one they are
    judged at.
    """
    if (
        claim.number not in AT_ONE_RATE
        or evidence.numbers["lr"].nunique() < 2
        or not len(evidence.paper)
    ):
        return claim
    return replace(
        claim,
        caveat=f"{claim.caveat} At learning rate {evidence.paper['lr'].iloc[0]:g} for all, {RULE}.",
    )


def _row(claim: Claim, variants: int, p: float, p_contrary: float) -> dict[str, Any]:
    found = claim.found
    judged = (
        "undecided"
        if claim.unsure
        else verdict(found.low, found.high, found.n, p, p_contrary, claim.predicted)
    )
    numbers = asdict(found)
    sign = "<" if claim.predicted < 0 else ">"
    return {
        "claim": claim.name, "statement": claim.statement, "source": claim.source, "statistic": claim.statistic, **numbers,
        "verdict": judged, "caveat": _caveat(claim, variants), "number": claim.number, "family": claim.family,
        "predicted": f"{sign} 0", "test": f"exact Wilcoxon signed-rank, one-sided: effect {sign} "
                                          "0", "p_holm": p, "p_contrary": p_contrary,
    }  # fmt: skip


def _caveat(claim: Claim, variants: int) -> str:
    n = claim.found.n
    if n == 0:
        return claim.missing
    if left_out := claim.found.left_out:
        claim = replace(
            claim,
            caveat=f"{left_out} of {n + left_out} pairs have no number, and count against the "
            f"verdict. {claim.caveat}",
        )
    if n < FEWEST_SEEDS:
        return f"Fewer than {FEWEST_SEEDS} paired seeds decide nothing. {claim.caveat}"
    if variants / 2**n >= LEVEL:
        return f"With {n} seeds no p survives the correction for {variants} variants: {seeds_needed(variants)} could decide. {claim.caveat}"
    return claim.caveat


def claims(runs: "str | Path | pd.DataFrame") -> "pd.DataFrame":
    """One row per claim of the paper: what these runs say about it.

    1 means of activations, 2 coupling and gradient gap, 3 Theorem 2's correction, 4 inherited bias
    shift, 5 the causal test by updates and by added constants, 6 speed, 7 variance over epochs, 8
    batch normalization; of these, what the runs can speak to.

    Effects are paired by seed (equal initial weights, equal batches). Every claim predicts the sign
    of its effect. The verdict is *supported* when the 95 % t interval over seeds lies on that side
    of 0 and the exact one-sided test agrees after Holm's correction over the variants of the
    statement, *not supported* when all this holds of the contrary, else *undecided*; so it is, too,
    with fewer than 6 paired seeds, and where what is read off Fisher matrices was not repeated on
    two probes at three dampings with one sign. Pairs without a number count as the strongest
    evidence against: a verdict holds whatever they would have been. Correlations across the few
    activation functions are described, and never decided.

    Runs may differ in activation function, update, constant, batch normalization and learning rate.
    The rates must be the same for all. Claims 1 to 4 and 7 are about plain gradient descent at one
    rate; the others compare every kind of network and update at its own best rate. One rule chooses
    both kinds of rates: `biasshift.analysis.grid.RULE`.

    Args:
        runs: a run folder or a folder of runs, or the table that `biasshift.runs.reader.read_runs`
            returns.

    Returns:
        Columns ``claim``, ``statement``, ``source``, ``statistic``, ``effect``, ``low``, ``high``,
        ``n`` (paired seeds), ``p`` (of the exact test), ``verdict``, ``caveat``, ``number`` (1 to
        8), ``family`` (of variants that are corrected together), ``predicted`` (sign of the
        effect), ``test`` (its name and side), ``p_holm`` (corrected within the family: what the
        verdict goes by), ``p_contrary`` (the same of the opposite sign), ``p_holm_all`` (``p``
        corrected over all rows). `biasshift.analysis.statistics` says why.

    Raises:
        ValueError: when there are no runs, they lack what the claims are made of, are no runs of
            one setting, or have losses below 0.
    """
    import pandas as pd

    if not isinstance(runs, pd.DataFrame | str | os.PathLike):
        raise ValueError(
            "runs must be a run folder, a folder of runs, or a table of runs, got "
            f"{type(runs).__name__}."
        )
    return judged(runs if isinstance(runs, pd.DataFrame) else read_runs(runs))
