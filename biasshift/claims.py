"""The paper's claims, held against runs: a number, its interval over paired seeds, and a verdict that may be *undecided*."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift.reading import read_runs
from biasshift.summary import NAMES, fed_layers, per_run

if TYPE_CHECKING:
    import pandas as pd

FEWEST_SEEDS = 6  # below, an exact paired test cannot reach .05
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """A statement with a direction: the paper says that ``effect`` (ELU minus another activation, seed by seed) is below 0."""

    name: str
    statement: str
    source: str
    statistic: str
    column: str  # of the per-run numbers
    repeated: str | None  # the column of the examination at equal loss that must agree in sign, if there is one
    against: str
    transform: Callable[["pd.Series"], "pd.Series"] = lambda x: x
    caveat: str = ""


def _log(x: "pd.Series") -> "pd.Series":
    import numpy as np

    return np.log(x)


EQUAL_LOSS = "Compared at equal training loss, on two disjoint probes and at dampings 1e-4, 1e-2, 1."

CLAIMS = (
    Claim(
        "means", "ELU's mean unit activations are nearer zero than {other}'s", "section 3, Figure 2a",
        "|median over units of the mean activation|", "unit_mean", None, "relu", abs, "At equal steps.",
    ),
    Claim(
        "means-lrelu", "ELU's mean unit activations are nearer zero than {other}'s", "section 3, Figure 2a",
        "|median over units of the mean activation|", "unit_mean", None, "lrelu", abs, "At equal steps.",
    ),
    Claim(
        "coupling", "bias and weights are coupled less in ELU networks than in {other} networks", "Theorem 1",
        "ln 1/(1−h), median over units", "exam_inflation", "exam_inflation", "relu", _log, EQUAL_LOSS,
    ),
    Claim(
        "gap", "ELU's gradient is nearer the unit natural gradient than {other}'s", "section 3",
        "degrees between gradient and unit natural gradient", "exam_gap_degrees", "exam_gap_degrees", "relu", lambda x: x, EQUAL_LOSS,
    ),
    Claim(
        "inherited", "ELU units inherit a smaller share of their bias shift from below than {other} units", "section 3",
        "Σ|incoming| / Σ(|own| + |incoming| + |second order|)", "inherited", None, "relu", lambda x: x,
        "Single steps of SGD at equal steps, not equal loss.",
    ),
    Claim(
        "speed", "ELU networks learn faster than {other} networks", "section 4.1, Figure 2b",
        "ln of the training loss", "train_loss", None, "relu", _log, "At equal steps and one learning rate for all.",
    ),
)  # fmt: skip


def claims(runs: "str | Path | pd.DataFrame") -> "pd.DataFrame":
    """One row per claim of the paper: what these runs say about it.

    Effects are ELU minus the other activation, paired by seed (equal initial weights, equal batches); every claim says that its
    effect is negative. The verdict goes by the 95 % t interval over seeds: *supported* when it lies below 0, *not supported*
    when above, *undecided* when it holds 0, when there are fewer than 6 paired seeds, or when the sign of the effect changes
    with the damping or the probe.

    Args:
        runs: a run folder or a folder of runs, or the table that `biasshift.reading.read_runs` returns.

    Returns:
        Columns ``claim``, ``statement``, ``source``, ``statistic``, ``effect``, ``low``, ``high``, ``n`` (paired seeds), ``p`` (exact
        two-sided Wilcoxon signed-rank test, not corrected for the number of claims), ``verdict``, ``caveat``.

    Raises:
        ValueError: when there are no runs, or they lack what the claims are made of.
    """
    import pandas as pd

    table = runs if isinstance(runs, pd.DataFrame) else read_runs(runs)
    numbers = per_run(table)
    examined = _examinations(table)
    at_equal_loss = examined.groupby("run", observed=True).mean(numeric_only=True) if len(examined) else examined
    numbers = numbers.join(at_equal_loss[[c for c in at_equal_loss if c.startswith("exam_")]], on="run") if len(examined) else numbers
    rows = [_judge(claim, numbers, examined) for claim in CLAIMS] + [_corrected_mean(numbers)]
    return pd.DataFrame([row for row in rows if row])


def _examinations(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run, probe and damping: means over the layers that are fed by an activation."""
    if "exam_damping" not in table:
        return table.iloc[:0]
    rows = table[table["exam_damping"].notna()]
    columns = [name for name in table if str(name).startswith("exam_") and name not in ("exam_probe", "exam_damping")]
    keys = ["run", "activation", "seed", "exam_probe", "exam_damping"]
    return rows.groupby(keys, observed=True, sort=False)[columns].mean().reset_index()


def _judge(claim: Claim, numbers: "pd.DataFrame", examined: "pd.DataFrame") -> dict | None:
    if claim.column not in numbers or not {"elu", claim.against} <= set(numbers["activation"]):
        return None
    effects = _paired(numbers, claim.column, claim.against, claim.transform)
    row = {
        "claim": claim.name,
        "statement": claim.statement.format(other=NAMES[claim.against]),
        "source": claim.source,
        "statistic": claim.statistic,
        **interval(effects),
        "caveat": claim.caveat,
    }
    row["verdict"] = verdict(row["low"], row["high"], row["n"])
    if claim.repeated and row["verdict"] != "undecided" and not _same_sign(claim, examined, row["effect"]):
        row["verdict"] = "undecided"
        row["caveat"] += " The sign changes with the damping or the probe."
    return row


def _corrected_mean(numbers: "pd.DataFrame") -> dict | None:
    """Theorem 2's correction has no pairs: the share of units whose effective incoming mean is smaller, against one half."""
    column = "exam_smaller_share" if "exam_smaller_share" in numbers else "shrinks"
    by_seed = numbers.groupby("seed")[column].mean().dropna() - 0.5
    row = {
        "claim": "correction",
        "statement": "Theorem 2's correction makes the effective incoming mean smaller more often than not",
        "source": "Theorem 2",
        "statistic": "½ − share of units with |μ − k m| < |μ|, all activations",
        **interval(-by_seed),
        "caveat": f"{EQUAL_LOSS if column.startswith('exam') else ''} The theorem does not promise it; interval over seeds.".strip(),
    }
    return row | {"verdict": verdict(row["low"], row["high"], row["n"])}


def _paired(numbers: "pd.DataFrame", column: str, other: str, transform: Callable) -> "pd.Series":
    by_seed = numbers.pivot_table(index="seed", columns="activation", values=column, observed=True, dropna=False)
    if not {"elu", other} <= set(by_seed):
        return by_seed.iloc[:0, 0] if by_seed.shape[1] else by_seed.sum(axis=1)
    return (transform(by_seed["elu"]) - transform(by_seed[other])).dropna()


def _same_sign(claim: Claim, examined: "pd.DataFrame", effect: float) -> bool:
    groups = examined.groupby(["exam_probe", "exam_damping"])
    means = [_paired(group, claim.repeated or "", claim.against, claim.transform).mean() for _, group in groups]
    return all(mean * effect > 0 for mean in means)


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


def verdict(low: float, high: float, n: int) -> str:
    """*supported* below 0, *not supported* above, *undecided* across 0 or with too few pairs."""
    if n < FEWEST_SEEDS:
        return "undecided"
    return "supported" if high < 0 else "not supported" if low > 0 else "undecided"


def sentences(found: "pd.DataFrame") -> list[str]:
    """One plain sentence per claim."""
    said = {"supported": "This run supports", "not supported": "This run speaks against", "undecided": "This run leaves undecided"}
    return [
        f"{said[row.verdict]} that {row.statement} ({row.source}): {row.statistic}, difference {row.effect:+.3g} "
        f"[{row.low:+.3g}, {row.high:+.3g}], n = {row.n}, p = {row.p:.3g}. {row.caveat}"
        for row in found.itertuples()
    ]


__all__ = ["CLAIMS", "Claim", "claims", "fed_layers", "interval", "sentences", "verdict"]
