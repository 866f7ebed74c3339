"""The first section: what the runs say about the claims. One line a question; its claims open on
demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biasshift.analysis.formatting import READING, deciding_p, reading_table, sentences
from biasshift.analysis.per_run import per_run
from biasshift.analysis.verdicts import claims
from biasshift.report.groups import Series
from biasshift.report.html import escaped, faint, folded, number, table

if TYPE_CHECKING:
    import pandas as pd

MOST_SETTINGS = 6  # of which each gets its own claims
MOST_CLAIMS = 200
_BADGES = {"supported": "supported", "not supported": "contrary", "undecided": "undecided"}
_SHOWN = (
    "claim",
    "statement",
    "source",
    "statistic",
    "effect",
    "low",
    "high",
    "n",
    "verdict",
    "caveat",
    "number",
)
_QUESTIONS = {
    1: "Mean activations", 2: "Coupling, and gradient against natural "
                              "gradient", 3: "The correction of Theorem 2",
    4: "Inherited bias shift", 5: "The causal test: other updates, added "
                                  "constants", 6: "Speed", 7: "Variance over epochs",
    8: "Batch normalization",
}  # fmt: skip
_NOTE = """\
Open a question for its claims, and a claim for its caveats. Effects are over paired seeds, with 95 % intervals; p is Holm's, corrected \
within a family of claims, and the verdict goes by it. Not supported means that the contrary holds: there p is that of the contrary."""


def verdicts_part(runs: pd.DataFrame, series: Sequence[Series], left_out: list[str]) -> str:
    """Claims and the table for reading, for all runs; where they are of several settings, for each
    setting by itself.
    """
    try:
        said, counts = _said(runs)
        return counts + said
    except ValueError as error:
        whole = str(error)
    settings = list(dict.fromkeys(one.setting for one in series))
    parts, reasons = [], {whole}
    for setting in settings[:MOST_SETTINGS] if len(settings) > 1 else []:
        of_it = [run for one in series if one.setting == setting for run in one.runs]
        try:
            said, counts = _said(runs.loc[runs["run"].isin(of_it)])
        except ValueError as error:
            reasons.add(str(error))
            said, counts = faint(f"No verdicts. {error}"), ""
        parts.append(f"<h3>{escaped(setting or 'all other runs', 200)}</h3>{counts}{said}")
    if not parts or (reasons == {whole} and all("No verdicts" in part for part in parts)):
        return faint(f"No verdicts. {whole}")
    if len(settings) > MOST_SETTINGS:
        left_out.append(
            f"Claims of {len(settings) - MOST_SETTINGS} of {len(settings)} settings: give fewer "
            "runs at a time."
        )
    return faint(f"{whole} So here each setting stands by itself.") + "".join(parts)


def _said(runs: pd.DataFrame) -> tuple[str, str]:
    """The claims and the table for reading, and how many claims have which verdict."""
    try:
        found = claims(runs)
        summary = folded("Mean ± SD over seeds", _reading(reading_table(per_run(runs)), READING))
    except (
        TypeError,
        LookupError,
    ) as error:  # options of other kinds than any run of ours has must not take the charts away
        raise ValueError(
            f"These runs' options are not of the kinds that claims are made of ({error})."
        ) from error
    counts = "; ".join(
        f"{count} {verdict}" for verdict, count in found["verdict"].value_counts().items()
    )
    more = (
        f" {len(found) - MOST_CLAIMS} more claims are not shown."
        if len(found) > MOST_CLAIMS
        else ""
    )
    return claims_part(found.head(MOST_CLAIMS), sentences(found)[:MOST_CLAIMS]) + summary, faint(
        f"{counts}.{more} {_NOTE}"
    )


def claims_part(found: pd.DataFrame, said: Sequence[str]) -> str:
    """A line per question with its verdicts counted, in it a row per claim; then the same as
    sentences.
    """
    parts = ""
    for question in dict.fromkeys(found["number"]):
        some = found.loc[found["number"] == question]
        counts = some["verdict"].value_counts()
        badges = " ".join(
            _badge(verdict, f"{counts[verdict]} {verdict}")
            for verdict in _BADGES
            if verdict in counts
        )
        title = f"{question} · {_QUESTIONS[question]}" if question in _QUESTIONS else "Others"
        rows = table(
            ["verdict", "claim", "effect [95 %]", "n", "p, Holm"],
            map(_claim, some.itertuples(index=False)),
            "claims",
        )
        parts += folded(f"<b>{escaped(title)}</b> {badges}", rows)
    words = "".join(f"<li>{escaped(sentence, 1000)}</li>" for sentence in said)
    return parts + folded("All in sentences", f"<ul>{words}</ul>")


def _claim(row: Any) -> list[tuple[str, str]]:
    decided, contrary = deciding_p(row)
    others = {
        "uncorrected p" if name == "p" else name: value
        for name, value in row._asdict().items()
        if name not in _SHOWN
    }
    more = [
        f"{name} = {number(value) if isinstance(value, float) else value}"
        for name, value in others.items()
    ]
    about = [row.caveat, f"Measured: {row.statistic} ({row.source}).", "; ".join(more)]
    p = f"p = {number(decided, 2)}"
    return [
        ("", _badge(row.verdict, row.verdict)),
        (
            "text",
            folded(
                escaped(row.statement),
                "".join(f'<p class="faint">{escaped(text, 1000)}</p>' for text in about if text),
            ),
        ),
        (
            "number",
            number(row.effect)
            + (f" [{number(row.low)}, {number(row.high)}]" if row.low == row.low else ""),
        ),
        ("number", f"n = {escaped(row.n)}"),
        ("number", p + ("<br>the contrary holds" if contrary else "")),
    ]


def _badge(verdict: Any, text: Any) -> str:
    return f'<span class="badge {_BADGES.get(verdict, "undecided")}">{escaped(text)}</span>'


def _reading(found: pd.DataFrame, how: str) -> str:
    """`biasshift.analysis.formatting.reading_table`, and how to read it."""
    rows = [
        [("text", escaped(name)), *(("number", escaped(text.replace("-", "−"))) for text in row)]
        for name, row in zip(found.index, found.to_numpy(), strict=True)
        if set(row) != {"–"}
    ]
    return faint(how) + table(["", *map(str, found.columns)], rows)
