"""The paper's claims, held against runs: a number, its interval over paired seeds, and a verdict that may be *undecided*."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift.analysis.statistics import LEVEL, seeds_needed
from biasshift.analysis.verdicts import judged
from biasshift.runs.reader import read_runs

if TYPE_CHECKING:
    import pandas as pd

SAID = {"supported": "Supported", "not supported": "Not supported, the contrary holds", "undecided": "Undecided"}


def claims(runs: "str | Path | pd.DataFrame") -> "pd.DataFrame":
    """One row per claim of the paper: what these runs say about it.

    1 means of activations, 2 coupling and gradient gap, 3 Theorem 2's correction, 4 inherited bias shift, 5 the causal test by
    updates and by added constants, 6 speed, 7 variance over epochs, 8 batch normalization; of these, what the runs can speak to.

    Effects are paired by seed (equal initial weights, equal batches). Every claim predicts the sign of its effect. The verdict is
    *supported* when the 95 % t interval over seeds lies on that side of 0 and the exact one-sided test agrees after Holm's correction
    over the variants of the statement, *not supported* when all this holds of the contrary, else *undecided*; so it is, too, with
    fewer than 6 paired seeds, and where what is read off Fisher matrices was not repeated on two probes at three dampings with one
    sign. Pairs without a number count as the strongest evidence against: a verdict holds whatever they would have been.
    Correlations across the few activation functions are described, and never decided.

    Runs may differ in activation function, update, constant, batch normalization and learning rate. The rates must be the same for
    all. Claims 1 to 4 and 7 are about plain gradient descent at one rate; the others compare every kind of network and update at its
    own best rate. One rule chooses both kinds of rates: `biasshift.analysis.grid.RULE`.

    Args:
        runs: a run folder or a folder of runs, or the table that `biasshift.runs.reader.read_runs` returns.

    Returns:
        Columns ``claim``, ``statement``, ``source``, ``statistic``, ``effect``, ``low``, ``high``, ``n`` (paired seeds), ``p`` (of the
        exact test), ``verdict``, ``caveat``, ``number`` (1 to 8), ``family`` (of variants that are corrected together), ``predicted``
        (sign of the effect), ``test`` (its name and side), ``p_holm`` (corrected within the family: what the verdict goes by),
        ``p_contrary`` (the same of the opposite sign), ``p_holm_all`` (``p`` corrected over all rows).
        `biasshift.analysis.statistics` says why.

    Raises:
        ValueError: when there are no runs, they lack what the claims are made of, are no runs of one setting, or have losses below 0.
    """
    import pandas as pd

    if not isinstance(runs, pd.DataFrame | str | os.PathLike):
        raise ValueError(f"runs must be a run folder, a folder of runs, or a table of runs, got {type(runs).__name__}.")
    return judged(runs if isinstance(runs, pd.DataFrame) else read_runs(runs))


def sentences(found: "pd.DataFrame") -> list[str]:
    """One plain sentence per claim, with its number, interval and caveat."""
    return [f"{SAID[row.verdict]}: {row.statement} ({row.source}). {_number(row)}{row.caveat}" for row in found.itertuples()]


def _number(row: Any) -> str:
    if row.n == 0:
        return ""
    p, contrary = deciding_p(row)
    p = f", p = {p:.2g}{' of the contrary' * contrary}" if p == p else ""
    return f"{row.statistic}: {effect(row)}, n = {row.n}{p}. "


def deciding_p(row: Any) -> tuple[float, bool]:
    """The corrected p that the verdict of a claim goes by, and whether it is that of the contrary."""
    contrary = row.verdict == "not supported"
    return (row.p_contrary if contrary else row.p_holm), contrary


def effect(row: Any) -> str:
    """The effect of a claim with its interval, for people."""
    if row.effect != row.effect:
        return "undefined"  # a share of a gap, where there is none
    interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.low == row.low else ""
    return f"{row.effect:+.3g}{interval}"


def claims_markdown(found: "pd.DataFrame") -> str:
    """The table of claims as Markdown, for people: verdict, statement, effect, seeds, p, caveat."""
    head = (
        "claim",
        "verdict",
        "statement",
        "statistic",
        "effect [95 % interval], predicted",
        "n",
        "p",
        "p, Holm",
        "p of the contrary, Holm",
        "caveat",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found.itertuples():
        row: Any = row
        shown = f"{effect(row)}, {row.predicted}" if row.n else f"–, {row.predicted}"
        cells = [
            f"{row.number} {row.claim}", row.verdict, f"{row.statement} ({row.source})", row.statistic, shown, str(row.n),
            _p(row.p), _p(row.p_holm), _p(row.p_contrary), row.caveat,
        ]  # fmt: skip
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines) + f"\n\n{footnote(found)}\n"


def footnote(found: "pd.DataFrame") -> str:
    """How many questions these are, and what is left when they are taken as one."""
    tested = found[found["p"].notna()]
    families, seeds = tested["family"].nunique(), int(tested["n"].max()) if len(tested) else 0
    strict = int(((tested["verdict"] == "supported") & (tested["p_holm_all"] < LEVEL)).sum())
    possible = "" if len(tested) / 2**seeds < LEVEL else f"; with {seeds} seeds none could: {seeds_needed(len(tested))} are needed"
    return (
        f"{len(tested)} tests in {families} families of variants; Holm's correction is within families. If nothing held, about "
        f"{families * LEVEL / 2:.1f} families would be called supported, and as many not supported, by chance. "
        f"Corrected over all tests at once {strict} supported claims remain{possible}."
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value == value else "–"


def _escaped(text: str) -> str:
    """Names of runs come from anywhere: no cell may end early or hold markup."""
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
