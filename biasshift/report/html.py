"""Text from run folders, made fit for a page: short, printable, told apart, escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 400


def plain(value: object, longest: int = LONGEST) -> str:
    """Returns `value` as text without control, direction and surrogate characters, cut to `longest`
    characters and saying so.

    >>> plain("a" * 50, 10)
    'aaaaaaaaaa… (50 characters)'
    """
    text = value if isinstance(value, str) else str(value)
    kept = "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}"
        for char in text[:longest]
    )
    return kept if len(text) <= longest else f"{kept}… ({len(text):,} characters)"


def escaped(value: object, longest: int = LONGEST) -> str:
    """Returns `plain(value)` for HTML, within and outside of quotes."""
    return html.escape(plain(value, longest))


def number(value: float, digits: int = 3) -> str:
    """
    >>> number(-0.12345), number(float("nan"))
    ('−0.123', '–')
    """
    return "–" if value != value else f"{value:.{digits}g}".replace("-", "−")


def told_apart(names: Sequence[str]) -> list[str]:
    """Returns the names, with a number behind those that occurred before: cut names may be equal.

    >>> told_apart(["a", "b", "a"])
    ['a', 'b', 'a #2']
    """
    taken: set[str] = set()
    found = []
    for name in names:
        unique, count = name, 2
        while unique in taken:
            unique, count = f"{name} #{count}", count + 1
        taken.add(unique)
        found.append(unique)
    return found


def listed(names: Iterable[object], most: int = 12) -> str:
    names = [plain(name, 60) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def as_json(value: Any) -> str:
    """Returns JSON that ends no `<script>` and opens no comment: `<` is written as an escape.

    >>> as_json({"a": "</script>"})
    '{"a":"\\\\u003c/script>"}'
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


# -- pieces of HTML. What is called HTML here was made from `escaped` text ---------------------


def faint(text: str) -> str:
    return f'<p class="faint">{escaped(text, 2000)}</p>' if text else ""


def folded(summary: str, inner: str, opened: bool = False) -> str:
    """A line of HTML that shows more HTML when it is clicked."""
    return f"<details{' open' * opened}><summary>{summary}</summary>{inner}</details>"


def table(head: Iterable[str], rows: Iterable[Sequence[tuple[str, str]]], kind: str = "") -> str:
    """A table of (class, HTML) cells; the head is text."""
    top = "".join(f"<th>{escaped(name, 60)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{look}">{cell}</td>' for look, cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
