"""Numbers and verdicts as people read them: tables of runs, sentences, Markdown."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from biasshift.activation_names import display_name
from biasshift.analysis.grid import CELL, best_rate, cell_of, paper_runs
from biasshift.analysis.statistics import LEVEL, seeds_needed

VERDICTS = {  # how a sentence about a claim begins
    "supported": "Supported",
    "not supported": "Contradicted",
    "undecided": "Undecided",
}
MARKS = {"supported": "✓", "not supported": "✗", "undecided": "?"}
MAIN = ("means", "gap", "coupling", "correction", "inherited", "speed")  # the claims seen first
QUANTITIES = {  # column of `per_run` → its name in the table for reading
    "unit_mean": "mean unit activation, median",
    "unit_mean_abs": "|mean unit activation|, mean",
    "inherited": "share of bias shift inherited",
    "train_loss": "training loss at the end",
    "exam_step": "steps to equal loss",
    "exam_inflation": "coupling 1/(1−h)",
    "exam_k": "k",
    "exam_gap_degrees": "gradient gap (degrees)",
    "exam_smaller_share": "units with |μ − k m| < |μ|",
    "exam_effective_samples": "effective samples",
    "exam_excluded": "excluded units (share)",
}
READING = (
    "The first four rows: at equal steps, over all hidden units; shares over all measured steps, "
    "layers behind the first.\n"
    "The others: at equal training loss, layers fed by an activation (medians over units, means "
    "over layers, damping 0.01).\n"
    "Units with fewer than ten effective samples per incoming activation are excluded there: their "
    "numbers are biased."
)
HEADINGS = (
    "claim", "verdict", "statement", "statistic", "effect [95 % interval], predicted", "n", "p",
    "p, Holm", "p of the contrary, Holm", "caveat",
)  # fmt: skip


def reading_table(
    numbers: pd.DataFrame, quantities: Mapping[str, str] = QUANTITIES
) -> pd.DataFrame:
    """Returns the table for reading: one row per quantity, one column per activation function.

    Cells are texts, mean ± SD over seeds. Of runs of several updates and learning rates, it shows
    those that the paper compared: plain gradient descent at one rate. Without such runs it shows
    all, one column per cell and rate.

    Args:
        numbers: as `per_run` returns them.
        quantities: columns of `numbers` → their names in the table.
    """
    paper, columns = paper_runs(numbers), {}
    for _, group in (paper if len(paper) else numbers).groupby([*CELL, "lr"], sort=False):
        cell, rate = cell_of(group), group["lr"].iloc[0]
        name = display_name(cell.activation) if len(paper) else cell.name
        name = f"{name}, {rate:g}" if name in columns else name
        texts = {title: mean_and_sd(group[column]) for column, title in quantities.items()}
        columns[name] = {**texts, "seeds": str(len(group))}
    return pd.DataFrame(columns)


def sweep_table(numbers: pd.DataFrame) -> pd.DataFrame:
    """Returns the learning rates that were tried: one row per cell, one column per rate, as text.

    Shown is the training loss at the end, mean ± SD over seeds, with an asterisk at the rate that
    the cell is judged at. Column ``plain`` gives the rate at which plain runs are compared where
    the claim is not about speed.

    Args:
        numbers: as `per_run` returns them.
    """
    common = best_rate(paper_runs(numbers)) if len(paper_runs(numbers)) else float("nan")
    rows = {}
    for _, runs in numbers.groupby(list(CELL), sort=False):
        cell, best = cell_of(runs), best_rate(runs)
        texts = {
            f"{rate:g}": mean_and_sd(group["train_loss"]) + "*" * (rate == best)
            for rate, group in runs.groupby("lr")
        }
        rows[cell.name] = {**texts, "plain": f"{common:g}" if cell.update == "plain" else ""}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–")


def mean_and_sd(values: pd.Series) -> str:
    """Returns mean ± sample SD as text; the number of decimals follows the size of the values.

    Missing values are left out; then the text counts those that are there.

    >>> mean_and_sd(pd.Series([0.1, 0.3])), mean_and_sd(pd.Series([0.1, float("nan"), 0.3]))
    ('0.200 ± 0.141', '0.200 ± 0.141 (n = 2)')
    >>> mean_and_sd(pd.Series([float("nan")]))
    '–'
    """
    present = values.dropna()
    if not len(present):
        return "–"
    size = present.abs().mean()
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    sd = f" ± {present.std():.{digits}f}" if len(present) > 1 else ""
    count = f" (n = {len(present)})" if len(present) < len(values) else ""
    return f"{present.mean():.{digits}f}{sd}{count}"


def sentences(verdicts: pd.DataFrame) -> list[str]:
    """Returns one plain sentence per claim, with its number, interval and caveat.

    Args:
        verdicts: as `biasshift.claims` returns them.
    """
    return [
        f"{VERDICTS[row.verdict]}: {row.statement} ({row.source}). {_number(row)}{row.caveat}"
        for row in verdicts.itertuples()
    ]


def _number(row: Any) -> str:
    if row.n == 0:
        return ""
    p, contrary = deciding_p(row)
    p = f", p = {p:.2g}{' of the contrary' * contrary}" if p == p else ""
    return f"{row.statistic}: {effect(row)}, n = {row.n}{p}. "


def deciding_p(row: Any) -> tuple[float, bool]:
    """Returns the corrected p that decided a claim, and whether it is that of the contrary."""
    contrary = row.verdict == "not supported"
    return (row.p_contrary if contrary else row.p_holm), contrary


def effect(row: Any) -> str:
    """Returns the effect of a claim with its interval, for people.

    It reads "undefined" where there is no effect, such as a share of a gap that is not there.

    Args:
        row: a row of the claims with ``effect``, ``low`` and ``high``.
    """
    if row.effect != row.effect:
        return "undefined"
    interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.low == row.low else ""
    return f"{row.effect:+.3g}{interval}"


def main_claims(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Returns the claims of `MAIN` that were measured; where some were not, others in their place.

    Args:
        verdicts: as `biasshift.claims` returns them.
    """
    measured = verdicts[verdicts["n"] > 0]
    chosen = measured[measured["claim"].isin(MAIN)]
    others = measured[~measured["claim"].isin(MAIN)].head(len(MAIN) - len(chosen))
    return pd.concat([chosen, others])


def claims_markdown(verdicts: pd.DataFrame) -> str:
    """Returns the claims as a Markdown table with a footnote, for people.

    Columns: claim, verdict, statement, statistic, effect with interval and predicted sign, seeds,
    p values and caveat. Text from runs is escaped.

    Args:
        verdicts: as `biasshift.claims` returns them.
    """
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    for row in verdicts.itertuples():
        row: Any = row
        cells = [
            f"{row.number} {row.claim}",
            VERDICTS[row.verdict].lower(),
            f"{row.statement} ({row.source})",
            row.statistic,
            f"{effect(row) if row.n else '–'}, {row.predicted}",
            str(row.n),
            *(f"{p:.2g}" if p == p else "–" for p in (row.p, row.p_holm, row.p_contrary)),
            row.caveat,
        ]
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines) + f"\n\n{footnote(verdicts)}\n"


def footnote(verdicts: pd.DataFrame) -> str:
    """Returns how many questions were tested, and what remains when they are taken as one.

    Args:
        verdicts: as `biasshift.claims` returns them.
    """
    tested = verdicts[verdicts["p"].notna()]
    families, seeds = tested["family"].nunique(), int(tested["n"].max()) if len(tested) else 0
    strict = int(((tested["verdict"] == "supported") & (tested["p_holm_all"] < LEVEL)).sum())
    possible = (
        ""
        if len(tested) / 2**seeds < LEVEL
        else f"; with {seeds} seeds none could: {seeds_needed(len(tested))} are needed"
    )
    return (
        f"{len(tested)} tests in {families} families of variants; Holm's correction is within "
        f"families. If nothing held, about {families * LEVEL / 2:.1f} families would be called "
        "supported, and as many contradicted, by chance. Corrected over all tests at once "
        f"{strict} supported claims remain{possible}."
    )


def _escaped(text: str) -> str:
    """Names of runs come from anywhere: no cell may end early or hold markup."""
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
