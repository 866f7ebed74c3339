"""The paper's claims, held against runs: a number, its interval over paired seeds, and a verdict that may be *undecided*."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biasshift.reading import read_runs
from biasshift.summary import NAMES, examinations, per_run

if TYPE_CHECKING:
    import pandas as pd

FEWEST_SEEDS = 6  # below, an exact paired test cannot reach .05
CONFIDENCE = 0.95
EQUAL_STEPS = "At equal steps, not at equal loss."
EQUAL_LOSS = "At equal training loss; the sign is the same on two disjoint probes and at dampings 1e-4, 1e-2 and 1."
SIGN_CHANGES = "At equal training loss; the sign changes with the damping or the probe."
ONE_RATE = "One learning rate for all."
NO_PAIR = "No two runs with one seed reached their last epoch."
NO_EXAM = "No two runs with one seed came down to the equal loss."
NO_UNITS = "No two runs with one seed came down to the equal loss with enough effective samples."


@dataclass(frozen=True)
class Claim:
    """A statement with a direction: the paper says that ELU minus the other activation, seed by seed, is below 0."""

    name: str
    statement: str
    source: str
    statistic: str
    column: str  # of `biasshift.summary.per_run`; the ``exam_`` ones are repeated over probes and dampings
    caveat: str
    against: str = "relu"
    transform: Callable[["pd.Series"], "pd.Series"] = lambda x: x


CLAIMS = (
    Claim(
        "means", "ELU's mean unit activations are nearer zero than {other}'s", "section 3, Figure 2a",
        "|median over units of the mean activation|", "unit_mean", EQUAL_STEPS, transform=np.abs,
    ),
    Claim(
        "means-lrelu", "ELU's mean unit activations are nearer zero than {other}'s", "section 3, Figure 2a",
        "|median over units of the mean activation|", "unit_mean", EQUAL_STEPS, "lrelu", np.abs,
    ),
    Claim(
        "means-unitwise", "unit by unit, too, ELU's mean activations are nearer zero than {other}'s", "section 3",
        "mean over units of |mean activation|", "unit_mean_abs", EQUAL_STEPS,
    ),
    Claim(
        "coupling", "bias and weights are coupled less in ELU networks than in {other} networks", "Theorem 1",
        "ln 1/(1−h)", "exam_inflation", EQUAL_LOSS, transform=np.log,
    ),
    Claim(
        "gap", "ELU's gradient is nearer the unit natural gradient than {other}'s", "section 3",
        "degrees between gradient and unit natural gradient", "exam_gap_degrees", EQUAL_LOSS,
    ),
    Claim(
        "inherited", "ELU units inherit a smaller share of their bias shift from below than {other} units", "section 3",
        "Σ|incoming| / Σ(|own| + |incoming| + |second order|)", "inherited", f"{EQUAL_STEPS} Single steps of SGD.",
    ),
    Claim(
        "speed", "ELU networks learn faster than {other} networks", "section 4.1, Figure 2b",
        "ln of the steps to equal training loss", "exam_step", ONE_RATE, transform=np.log,
    ),
    Claim(
        "loss", "ELU networks end at a lower training loss than {other} networks", "section 4.1, Figure 2b",
        "ln of the training loss", "train_loss", "At equal steps; one learning rate for all.", transform=np.log,
    ),
)  # fmt: skip
CORRECTION = "Theorem 2's correction makes the effective incoming mean smaller more often than not"


def claims(runs: "str | Path | pd.DataFrame") -> "pd.DataFrame":
    """One row per claim of the paper: what these runs say about it.

    Effects are ELU minus the other activation, paired by seed (equal initial weights, equal batches); every claim says that its
    effect is negative. The verdict is *supported* when the 95 % t interval over seeds lies below 0 and the exact Wilcoxon test agrees
    (p < .05), *not supported* when it lies above 0 and the test agrees, else *undecided*; so it is, too, with fewer than 6 paired
    seeds, and when the sign of the effect changes with the damping or the probe.

    Args:
        runs: a run folder or a folder of runs, or the table that `biasshift.reading.read_runs` returns.

    Returns:
        Columns ``claim``, ``statement``, ``source``, ``statistic``, ``effect``, ``low``, ``high``, ``n`` (paired seeds), ``p`` (exact
        two-sided Wilcoxon signed-rank test, not corrected for the number of claims), ``verdict``, ``caveat``.

    Raises:
        ValueError: when there are no runs, they lack what the claims are made of, or they are no runs of one setting.
    """
    import pandas as pd

    table = runs if isinstance(runs, pd.DataFrame) else read_runs(runs)
    numbers, exams = per_run(table), examinations(table)
    known = set(numbers["activation"])
    rows = [_judge(claim, numbers, exams) for claim in CLAIMS if {"elu", claim.against} <= known]
    return pd.DataFrame([*rows, _correction(numbers, exams)])


def _judge(claim: Claim, numbers: "pd.DataFrame", exams: "pd.DataFrame") -> dict:
    found = interval(_paired(numbers, claim))
    judged, caveat = _verdict(found), claim.caveat
    if claim.caveat == EQUAL_LOSS:
        repeated = [_paired(group, claim).mean() for _, group in exams.groupby(["exam_probe", "exam_damping"])]
        judged, caveat = _repeated(judged, caveat, found["effect"], repeated)
    statement = claim.statement.format(other=NAMES[claim.against])
    return _row(claim.name, statement, claim.source, claim.statistic, found, judged, caveat)


def _correction(numbers: "pd.DataFrame", exams: "pd.DataFrame") -> dict:
    """Theorem 2's correction has no pairs: one half minus the share of units that it helps, all activations together."""

    def effect(rows: "pd.DataFrame") -> "pd.Series":
        return 0.5 - rows.groupby("seed")["exam_smaller_share"].mean().dropna()

    found = interval(effect(numbers))
    repeated = [effect(group).mean() for _, group in exams.groupby(["exam_probe", "exam_damping"])]
    judged, caveat = _repeated(_verdict(found), EQUAL_LOSS, found["effect"], repeated)
    return _row("correction", CORRECTION, "Theorem 2", "½ − share of units with |μ − k m| < |μ|", found, judged, caveat)


def _repeated(judged: str, caveat: str, effect: float, repeated: list[float]) -> tuple[str, str]:
    if all(mean * effect > 0 for mean in repeated) or not repeated:
        return judged, caveat
    return "undecided", SIGN_CHANGES


def _row(name: str, statement: str, source: str, statistic: str, found: dict, judged: str, caveat: str) -> dict:
    if found["n"] == 0:
        caveat = NO_EXAM if caveat == ONE_RATE else NO_UNITS if caveat in (EQUAL_LOSS, SIGN_CHANGES) else NO_PAIR
    elif found["n"] < FEWEST_SEEDS:
        caveat = f"Fewer than {FEWEST_SEEDS} paired seeds decide nothing. {caveat}"
    return {
        "claim": name, "statement": statement, "source": source, "statistic": statistic, **found, "verdict": judged, "caveat": caveat,
    }  # fmt: skip


def _paired(numbers: "pd.DataFrame", claim: Claim) -> "pd.Series":
    elu, other = (numbers[numbers["activation"] == name].set_index("seed")[claim.column] for name in ("elu", claim.against))
    return (claim.transform(elu) - claim.transform(other)).dropna()


def interval(effects: "pd.Series") -> dict[str, float]:
    """Mean, 95 % t interval, number of pairs, and the exact two-sided Wilcoxon p of paired differences."""
    from scipy import stats

    n = len(effects)
    mean = float(effects.mean()) if n else float("nan")
    if n < 2:
        return {"effect": mean, "low": float("nan"), "high": float("nan"), "n": n, "p": float("nan")}
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * effects.std() / n**0.5)
    p = float(stats.wilcoxon(effects, method="exact").pvalue) if (effects != 0).all() else float("nan")
    return {"effect": mean, "low": mean - half, "high": mean + half, "n": n, "p": p}


def verdict(low: float, high: float, n: int, p: float) -> str:
    """*supported* below 0, *not supported* above; *undecided* across 0, with too few pairs, or where the exact test disagrees."""
    if n < FEWEST_SEEDS or not p < 1 - CONFIDENCE:
        return "undecided"
    return "supported" if high < 0 else "not supported" if low > 0 else "undecided"


def _verdict(found: dict[str, float]) -> str:
    return verdict(found["low"], found["high"], int(found["n"]), found["p"])


def sentences(found: "pd.DataFrame") -> list[str]:
    """One plain sentence per claim, with its number, interval and caveat."""
    said = {"supported": "Supported", "not supported": "Not supported, the contrary holds", "undecided": "Undecided"}
    return [f"{said[row.verdict]}: {row.statement} ({row.source}). {_number(row)}{row.caveat}" for row in found.itertuples()]


def _number(row: Any) -> str:
    if row.n == 0:
        return ""
    interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.n > 1 else ""
    p = f", p = {row.p:.2g}" if row.p == row.p else ""
    return f"{row.statistic}: {row.effect:+.3g}{interval}, n = {row.n}{p}. "
