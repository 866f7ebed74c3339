"""The paper's claims, held against runs: a number, its interval over paired seeds, and a verdict
that may be *undecided*.
"""

from typing import TYPE_CHECKING, Any

from biasshift.analysis.grid import CELL, NAMES, best_rate, cell_of, paper_runs
from biasshift.analysis.statistics import LEVEL, seeds_needed

if TYPE_CHECKING:
    import pandas as pd

SAID = {
    "supported": "Supported",
    "not supported": "Not supported, the contrary holds",
    "undecided": "Undecided",
}


# column of `per_run` → its name in the table for reading
QUANTITIES = {
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
READING = """\
The first four rows: at equal steps, over all hidden units; shares over all measured steps, layers behind the first.
The others: at equal training loss, layers fed by an activation (medians over units, means over layers, damping 0.01).
Units with fewer than ten effective samples per incoming activation are excluded there: their numbers are biased."""


def reading_table(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """`per_run` → one row per quantity, one column per activation function, as text: mean ± SD over
    seeds.

    Of runs of several updates and learning rates, those that the paper compared: plain gradient
    descent at one rate.
    """
    import pandas as pd

    plain = paper_runs(numbers)
    columns = {}
    for _, group in (plain if len(plain) else numbers).groupby([*CELL, "lr"], sort=False):
        kind, rate = cell_of(group), group["lr"].iloc[0]
        name = NAMES.get(kind.activation, kind.activation) if len(plain) else kind.name
        name = f"{name}, {rate:g}" if name in columns else name
        texts = {title: mean_and_sd(group[column]) for column, title in QUANTITIES.items()}
        columns[name] = {**texts, "seeds": str(len(group))}
    return pd.DataFrame(columns)


def sweep_table(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """`per_run` → the learning rates that were tried: one row per kind of run, one column per rate,
    as text.

    The training loss at the end, mean ± SD over seeds; an asterisk at the rate that each is judged
    at, and in column ``plain`` the one at which plain runs are compared where the claim is not
    about speed.
    """
    import pandas as pd

    common = best_rate(paper_runs(numbers)) if len(paper_runs(numbers)) else float("nan")
    rows = {}
    for _, cell in numbers.groupby(list(CELL), sort=False):
        kind, chosen = cell_of(cell), best_rate(cell)
        texts = {
            f"{rate:g}": mean_and_sd(group["train_loss"]) + "*" * (rate == chosen)
            for rate, group in cell.groupby("lr")
        }
        rows[kind.name] = {**texts, "plain": f"{common:g}" if kind.update == "plain" else ""}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–")


def mean_and_sd(values: "pd.Series") -> str:
    """ "0.31 ± 0.02"; a dash where no run has a value, and how many have one where some have none."""
    found = values.dropna()
    if not len(found):
        return "–"
    size = found.abs().mean()
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    sd = f" ± {found.std():.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{sd}" + (
        f" (n = {len(found)})" if len(found) < len(values) else ""
    )


def sentences(found: "pd.DataFrame") -> list[str]:
    """One plain sentence per claim, with its number, interval and caveat."""
    return [
        f"{SAID[row.verdict]}: {row.statement} ({row.source}). {_number(row)}{row.caveat}"
        for row in found.itertuples()
    ]


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
            f"{row.number} {row.claim}", row.verdict, f"{row.statement} "
                                                      f"({row.source})", row.statistic, shown, str(row.n),
            _p(row.p), _p(row.p_holm), _p(row.p_contrary), row.caveat,
        ]  # fmt: skip
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return "\n".join(lines) + f"\n\n{footnote(found)}\n"


def footnote(found: "pd.DataFrame") -> str:
    """How many questions these are, and what is left when they are taken as one."""
    tested = found[found["p"].notna()]
    families, seeds = tested["family"].nunique(), int(tested["n"].max()) if len(tested) else 0
    strict = int(((tested["verdict"] == "supported") & (tested["p_holm_all"] < LEVEL)).sum())
    possible = (
        ""
        if len(tested) / 2**seeds < LEVEL
        else f"; with {seeds} seeds none could: {seeds_needed(len(tested))} are needed"
    )
    return (
        f"{len(tested)} tests in {families} families of variants; Holm's correction is within "
        "families. If nothing held, about "
        f"{families * LEVEL / 2:.1f} families would be called supported, and as many not "
        "supported, by chance. "
        f"Corrected over all tests at once {strict} supported claims remain{possible}."
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value == value else "–"


def _escaped(text: str) -> str:
    """Names of runs come from anywhere: no cell may end early or hold markup."""
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
