"""The first section: what the runs say about the claims.

One line for each question; its claims open with a click, and the caveats of a claim with another.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from biasshift.analysis.formatting import READING, deciding_p, reading_table, sentences
from biasshift.analysis.quantities import per_run
from biasshift.analysis.verdicts import claims
from biasshift.report.groups import RunGroup
from biasshift.report.html import details, escaped, note, number, table

MAX_SETTINGS = 6  # each of which gets its own claims
MAX_CLAIMS = 200
_BADGES = {"supported": "supported", "not supported": "contrary", "undecided": "undecided"}  # → CSS
# What a claim shows in cells of its own, or not at all; all else stands below its caveat.
_COLUMNS = "claim statement source statistic effect low high n verdict caveat number".split()
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
95 % intervals. p is corrected within a family of claims (Holm) and decides the verdict. Not \
supported means that the opposite is supported: there p is that of the opposite."""


def verdicts_section(runs: pd.DataFrame, groups: Sequence[RunGroup], left_out: list[str]) -> str:
    """Returns the claims of all runs; where their settings differ, those of each setting.

    Runs that support no verdict get the reason in place of the claims.

    Args:
        runs: The rows of `biasshift.runs.reader.read_runs`.
        groups: The groups of runs, which name the settings.
        left_out: Gets a sentence where there are more than `MAX_SETTINGS` settings.
    """
    try:
        return _judged(runs)
    except ValueError as error:
        reason = str(error)
    settings = list(dict.fromkeys(group.setting for group in groups))
    parts, reasons = [], set()
    for setting in settings[:MAX_SETTINGS] if len(settings) > 1 else []:
        names = [run for group in groups if group.setting == setting for run in group.runs]
        try:
            judged = _judged(runs.loc[runs["run"].isin(names)])
            reasons.add("")
        except ValueError as error:
            judged = note(f"No verdicts. {error}")
            reasons.add(str(error))
        parts.append(f"<h3>{escaped(setting or 'all other runs', 200)}</h3>{judged}")
    if reasons <= {reason}:
        return note(f"No verdicts. {reason}")
    if len(settings) > MAX_SETTINGS:
        left_out.append(
            f"Claims of {len(settings) - MAX_SETTINGS} of {len(settings)} settings: give fewer "
            "runs at a time."
        )
    return note(f"{reason} So here each setting stands by itself.") + "".join(parts)


def _judged(runs: pd.DataFrame) -> str:
    """How many claims have which verdict, the claims, and the table for reading."""
    try:
        found = claims(runs, progress=False)
        reading = reading_table(per_run(runs))
    except (TypeError, LookupError) as error:
        # Options of other types than any run of ours has must not take the charts away.
        raise ValueError(
            f"The options of these runs do not have the types that claims need ({error})."
        ) from error
    verdicts = found["verdict"].value_counts()
    counts = "; ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    hidden = len(found) - MAX_CLAIMS
    more = f" {hidden} more claims are not shown." if hidden > 0 else ""
    return (
        note(f"{counts}.{more} {_NOTE}")
        + claims_by_question(found.head(MAX_CLAIMS), sentences(found)[:MAX_CLAIMS])
        + details("Mean ± SD over seeds", _reading(reading))
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
            _badge(verdict, f"{counts[verdict]} {verdict}")
            for verdict in _BADGES
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
    known = claim.low == claim.low
    interval = f" [{number(claim.low)}, {number(claim.high)}]" if known else ""
    return [
        ("", _badge(claim.verdict, claim.verdict)),
        ("text", details(escaped(claim.statement), notes)),
        ("number", number(claim.effect) + interval),
        ("number", f"n = {escaped(claim.n)}"),
        ("number", f"p = {number(p, 2)}{'<br>the contrary holds' * contrary}"),
    ]


def _badge(verdict: Any, text: Any) -> str:
    return f'<span class="badge {_BADGES.get(verdict, "undecided")}">{escaped(text)}</span>'


def _reading(means: pd.DataFrame) -> str:
    """`biasshift.analysis.formatting.reading_table`, without the rows of what was not measured."""
    rows = [
        [("text", escaped(name)), *(("number", escaped(text.replace("-", "−"))) for text in row)]
        for name, row in zip(means.index, means.to_numpy(), strict=True)
        if set(row) != {"–"}
    ]
    return note(READING) + table(["", *map(str, means.columns)], rows)
