"""What is seen first: a sentence, the effects of the main claims, the learning curves beside them.

The forest plot is a table whose rows hold a drawing each, so that its statements break into lines
on a narrow screen, and are there without JavaScript.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biasshift.analysis.formatting import MARKS, VERDICTS, main_claims
from biasshift.analysis.statistics import FEWEST_SEEDS
from biasshift.report.html import details, escaped, note, number, table
from biasshift.report.judgement import Judgement

MAX_OTHERS = 100
LOOKS = {"supported": "supported", "not supported": "contrary", "undecided": "undecided"}  # → CSS
_HEAD = ("", "claim", "against ← 0 → as predicted", "effect [95 % interval]")
_NOTE = (
    "Dots are mean effects over paired seeds, lines their 95 % intervals. Each row has its own "
    "scale: compare the sides of zero, not the lengths. Point at a statement for what was "
    "measured. Its caveat, below, says why it may be undecided on one side of zero."
)


def answer_section(judged: Sequence[Judgement], figures: str, curves: str) -> str:
    """Returns the answer in a sentence, its effects, and what stands beside them.

    Args:
        judged: As `biasshift.report.judgement.judgements` returns them; the first is open.
        figures: HTML with the links to the figures.
        curves: HTML of the learning curves.
    """
    first, *others = judged
    name = f"<h3>{escaped(first.setting, 200)}</h3>" if first.setting else ""
    left = name + _answer(first)
    left += "".join(details(escaped(one.setting, 200), _answer(one)) for one in others)
    return f'<div class="answer"><div>{left}{figures}</div><div>{curves}</div></div>'


def conclusion(claims: pd.DataFrame) -> str:
    """Returns the answer in one sentence: how many main claims the runs support.

    Args:
        claims: The table of `biasshift.claims`.
    """
    measured: Any = claims[claims["n"] > 0]
    if not len(measured):
        return "These runs measured none of the paper's claims."
    seeds = int(measured["n"].max())
    if seeds < FEWEST_SEEDS:
        some = f"{seeds} paired seed{'s' if seeds > 1 else ''} cannot"
        return f"These runs decide nothing: {some}, {FEWEST_SEEDS} can."
    main = main_claims(claims)
    found = list(main["verdict"])
    yes, no, open_ = (found.count(verdict) or "none" for verdict in VERDICTS)
    claimed = f"{len(main)} main claim{'s' if len(main) != 1 else ''} of the paper"
    return (
        f"Of {claimed}, {seeds} paired seeds support {yes}, contradict {no} and leave {open_} "
        "undecided."
    )


def forest(claims: pd.DataFrame) -> str:
    """Returns a row for each claim: its verdict, its statement, its interval drawn and in numbers.

    Args:
        claims: Rows of the table of `biasshift.claims`.
    """
    rows: Any = claims.itertuples(index=False)
    return table(_HEAD, map(_row, rows), "forest")


def effect_and_interval(claim: Any) -> str:
    """Returns the effect of a claim with its 95 % interval, as text."""
    known = claim.low == claim.low
    interval = f" [{number(claim.low)}, {number(claim.high)}]" if known else ""
    return number(claim.effect) + interval


def places(claim: Any) -> tuple[float, float, float]:
    """Returns where effect, low and high are drawn, from −100 to 100; NaN where one is unknown.

    The side on which the paper predicts the effect is the positive one.
    """
    sign = -1 if str(claim.predicted).startswith("<") else 1
    values = [sign * float(value) for value in (claim.effect, claim.low, claim.high)]
    size = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    effect, *limits = (float(np.clip(value / size, -1, 1)) * 96 for value in values)  # NaN stays
    low, high = sorted(limits) if limits[0] == limits[0] else limits
    return effect, low, high


def _answer(judgement: Judgement) -> str:
    if judgement.claims is None:
        return f'<p class="conclusion">No verdicts.</p>{note(judgement.reason)}'
    text = f'<p class="conclusion">{escaped(conclusion(judgement.claims))}</p>'
    measured: Any = judgement.claims[judgement.claims["n"] > 0]
    if not len(measured):
        return text
    main = main_claims(measured)
    others: Any = measured[~measured["claim"].isin(main["claim"])]
    more = f"Effects of {len(others)} more statements"
    if len(others) > MAX_OTHERS:
        more = f"Effects of {MAX_OTHERS} of {len(others)} more statements"
    return (
        text
        + forest(main)
        + (details(more, forest(others.head(MAX_OTHERS))) if len(others) else "")
        + note(_NOTE)
    )


def _row(claim: Any) -> list[tuple[str, str]]:
    word, look = VERDICTS[claim.verdict], LOOKS[claim.verdict]
    measured = escaped(f"{claim.statistic}; n = {claim.n}")
    mark = f'<span class="{look}" title="{word}">{MARKS[claim.verdict]}</span>'
    return [
        ("mark", mark),
        ("text", f'<span title="{measured}">{escaped(_capital(claim.statement))}</span>'),
        ("drawing", _drawing(claim, look)),
        ("number", escaped(effect_and_interval(claim))),
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _drawing(claim: Any, look: str) -> str:
    effect, low, high = (number(place, 4).replace("−", "-") for place in places(claim))
    line = f'<path class="line" d="M{low} 10H{high}"></path>' if low != "–" else ""
    dot = f'<circle cx="{effect}" cy="10" r="5"></circle>' if effect != "–" else ""
    text = escaped(f"{effect_and_interval(claim)}, predicted {claim.predicted}")
    return (
        f'<svg class="{look}" viewBox="-103 0 206 20" role="img" aria-label="{text}">'
        f'<path class="zero" d="M0 0V20"></path>{line}{dot}</svg>'
    )
