"""The section of all claims.

One line for each question; its claims open with a click, and the caveats of a claim with another.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import pandas as pd

from biasshift.analysis.formatting import READING, VERDICTS, deciding_p, sentences
from biasshift.report.answer import LOOKS, effect_and_interval
from biasshift.report.html import details, escaped, note, number, plain, table
from biasshift.report.judgement import Judgement

MAX_CLAIMS = 200
# What a claim shows in cells of its own, or not at all; all else stands below its caveat.
_COLUMNS = "claim statement source statistic effect low high n verdict caveat number".split()
_EXPORTED = {  # column of the claims → its heading in a CSV file
    "number": "question",
    "claim": "claim",
    "statement": "statement",
    "source": "source in the paper",
    "statistic": "measured",
    "verdict": "verdict",
    "effect": "effect",
    "low": "95 % interval, low",
    "high": "95 % interval, high",
    "predicted": "predicted",
    "n": "paired seeds",
    "test": "test",
    "p": "p",
    "p_holm": "p, corrected (Holm)",
    "p_contrary": "p of the opposite, corrected",
    "p_holm_all": "p, corrected over all claims",
    "family": "family",
    "caveat": "caveat",
}
_QUESTIONS = {
    1: "Mean activations",
    2: "Coupling, and gradient against natural gradient",
    3: "The correction of Theorem 2",
    4: "Inherited bias shift",
    5: "The causal test: other updates, added constants",
    6: "Speed",
    7: "Variance over epochs",
    8: "Batch normalization",
}
_NOTE = """\
Open a question for its claims, and a claim for its caveats. Effects are over paired seeds, with \
95 % intervals. p is corrected within a family of claims (Holm) and decides the verdict. \
Contradicted means that the opposite is supported, and p is then that of the opposite."""


def verdicts_section(judged: Sequence[Judgement], why_apart: str) -> str:
    """Returns the claims of all runs; where their settings differ, those of each setting.

    Runs that support no verdict get the reason in place of the claims.

    Args:
        judged: As `biasshift.report.judgement.judgements` returns them.
        why_apart: Why the settings are not judged together.
    """
    if not why_apart:
        return _one(judged[0], 0)
    parts = [
        f"<h3>{escaped(one.setting, 200)}</h3>{_one(one, position)}"
        for position, one in enumerate(judged)
    ]
    return note(f"{why_apart} So here each setting stands by itself.") + "".join(parts)


def claims_exports(judged: Sequence[Judgement]) -> dict[str, dict[str, Any]]:
    """Returns the claims of each judgement as a table of numbers, for a CSV file.

    Numbers are not rounded; what is unknown is None.
    """
    exports = {}
    for position, one in enumerate(judged):
        if one.claims is None:
            continue
        columns = [name for name in _EXPORTED if name in one.claims]
        found = one.claims.assign(verdict=one.claims["verdict"].map(_word))
        rows = [[_exported(value) for value in row] for row in found[columns].to_numpy(object)]
        names = [_EXPORTED[name] for name in columns]
        exports[f"claims-{position}"] = {"names": names, "rows": rows}
    return exports


def _one(judgement: Judgement, position: int) -> str:
    """How many claims have which verdict, the claims, and the table for reading."""
    if (found := judgement.claims) is None:
        return note(f"No verdicts. {judgement.reason}")
    verdicts = found["verdict"].value_counts()
    counts = "; ".join(f"{count} {_word(verdict)}" for verdict, count in verdicts.items())
    hidden = len(found) - MAX_CLAIMS
    more = f" {hidden} more claims are not shown." if hidden > 0 else ""
    button = f'<button type="button" data-export="claims-{position}">All claims as CSV</button>'
    listed = claims_by_question(found.head(MAX_CLAIMS), sentences(found)[:MAX_CLAIMS])
    return (
        note(f"{counts}.{more} {_NOTE}")
        + f'<div class="searchable" data-name="claims">{button}{listed}</div>'
        + details("Mean ± SD over seeds", _reading(judgement.means))
    )


def claims_by_question(claims: pd.DataFrame, sentences: Sequence[str]) -> str:
    """Returns a line for each question with its verdicts counted, in it a row for each claim.

    Args:
        claims: The table of `biasshift.claims`.
        sentences: The same claims in sentences, which stand below.
    """
    parts = ""
    grouped: Any = claims.groupby("number", sort=False)
    for question, rows in grouped:
        counts = rows["verdict"].value_counts()
        badges = " ".join(
            _badge(verdict, f"{counts[verdict]} {_word(verdict)}")
            for verdict in LOOKS
            if verdict in counts
        )
        known = question in _QUESTIONS
        title = f"{question} · {_QUESTIONS[question]}" if known else "Others"
        head = ["verdict", "claim", "effect [95 %]", "n", "p, Holm"]
        cells = map(_cells, rows.itertuples(index=False))
        parts += details(f"<b>{escaped(title)}</b> {badges}", table(head, cells, "claims"))
    items = "".join(f"<li>{escaped(sentence, 1000)}</li>" for sentence in sentences)
    return parts + details("All in sentences", f"<ul>{items}</ul>")


def _cells(claim: Any) -> list[tuple[str, str]]:
    p, contrary = deciding_p(claim)
    others = "; ".join(
        f"{'uncorrected p' if name == 'p' else name} = "
        f"{number(value) if isinstance(value, float) else value}"
        for name, value in claim._asdict().items()
        if name not in _COLUMNS
    )
    about = [claim.caveat, f"Measured: {claim.statistic} ({claim.source}).", others]
    notes = "".join(f'<p class="faint">{escaped(text, 1000)}</p>' for text in about if text)
    return [
        ("", _badge(claim.verdict, _word(claim.verdict))),
        ("text", details(escaped(claim.statement), notes)),
        ("number", effect_and_interval(claim)),
        ("number", f"n = {escaped(claim.n)}"),
        ("number", f"p = {number(p, 2)}{'<br>the contrary holds' * contrary}"),
    ]


def _badge(verdict: Any, text: Any) -> str:
    return f'<span class="badge {LOOKS.get(verdict, "undecided")}">{escaped(text)}</span>'


def _exported(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value, 1000)
    return value if isfinite(value) else None


def _word(verdict: Any) -> str:
    return VERDICTS.get(verdict, str(verdict)).lower()


def _reading(means: pd.DataFrame) -> str:
    """`biasshift.analysis.formatting.reading_table`, without the rows of what was not measured."""
    rows = [
        [("text", escaped(name)), *(("number", escaped(text.replace("-", "−"))) for text in row)]
        for name, row in zip(means.index, means.to_numpy(), strict=True)
        if set(row) != {"–"}
    ]
    return note(READING) + table(["", *map(str, means.columns)], rows)
