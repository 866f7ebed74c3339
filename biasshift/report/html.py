"""Text from run folders, made fit for a page, and the pieces of HTML that hold it.

Nothing that a run folder contains is trusted. ``plain`` text is short and printable; ``escaped``
text may also stand anywhere in HTML. Arguments that are called HTML were made from escaped text.
"""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from biasshift.escapes import visible

MAX_CHARACTERS = 400


# -- text ------------------------------------------------------------------------------------------


def plain(value: object, longest: int = MAX_CHARACTERS) -> str:
    """Returns ``str(value)``, cut to ``longest`` characters, with escapes for what is not seen.

    Newlines stay. The length of a text that was cut stands behind it.

    >>> plain("a" * 50, 10)
    'aaaaaaaaaa… (50 characters)'
    """
    text = str(value)
    kept = visible(text[:longest], keep="\n")
    return kept if len(text) <= longest else f"{kept}… ({len(text):,} characters)"


def escaped(value: object, longest: int = MAX_CHARACTERS) -> str:
    """Returns ``plain(value, longest)`` for HTML, inside and outside of quotes.

    >>> escaped("<b>")
    '&lt;b&gt;'
    """
    return html.escape(plain(value, longest))


def number(value: float, digits: int = 3) -> str:
    """Returns a number with ``digits`` significant digits and a minus sign; NaN is a dash.

    >>> number(-0.12345), number(float("nan"))
    ('−0.123', '–')
    """
    return "–" if value != value else f"{value:.{digits}g}".replace("-", "−")


def listed(names: Iterable[object], most: int = 12) -> str:
    """Returns the first ``most`` names, each cut to 60 characters, and how many more there are.

    >>> listed("abcd", 2)
    'a, b and 2 more'
    """
    names = [plain(name, 60) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def distinct(names: Sequence[str]) -> list[str]:
    """Returns the names, each that occurred before with a number behind it.

    Names may become equal when they are cut, and the charts need one label for one thing.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a #2']
    """
    labels: dict[str, None] = {}
    for name in names:
        label, count = name, 2
        while label in labels:
            label, count = f"{name} #{count}", count + 1
        labels[label] = None
    return list(labels)


def as_json(value: Any) -> str:
    """Returns JSON in which ``<`` is an escape, so that it ends no ``<script>`` and no comment.

    Raises:
        ValueError: A number is NaN or infinite, for which JSON has no word.

    >>> as_json({"a": "</script>"})
    '{"a":"\\\\u003c/script>"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# -- HTML ------------------------------------------------------------------------------------------


def note(text: str) -> str:
    """Returns a paragraph in small gray letters, of text that is not escaped yet.

    At most 2,000 characters are shown. No text makes no paragraph.
    """
    return f'<p class="faint">{escaped(text, 2000)}</p>' if text else ""


def details(summary: str, content: str, opened: bool = False) -> str:
    """Returns a line of HTML that shows more HTML when it is clicked."""
    return f"<details{' open' * opened}><summary>{summary}</summary>{content}</details>"


def table(head: Iterable[str], rows: Iterable[Sequence[tuple[str, str]]], kind: str = "") -> str:
    """Returns a table that scrolls sideways where the screen is narrow.

    Args:
        head: The names of the columns, as text.
        rows: The cells of each row, as pairs of a CSS class ("", "text", "number") and HTML.
        kind: The CSS class of the table.
    """
    top = "".join(f"<th>{escaped(name, 60)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{look}">{cell}</td>' for look, cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
