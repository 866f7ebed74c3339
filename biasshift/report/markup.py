"""Pieces of HTML. What is called HTML here was made from `escaped` text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from biasshift.report.html import escaped


def faint(text: str) -> str:
    return f'<p class="faint">{escaped(text, 2000)}</p>' if text else ""


def folded(summary: str, inner: str, opened: bool = False) -> str:
    """A line of HTML that shows more HTML when it is clicked."""
    return f"<details{' open' * opened}><summary>{summary}</summary>{inner}</details>"


def table(head: Iterable[str], rows: Iterable[Sequence[tuple[str, str]]], kind: str = "") -> str:
    """A table of (class, HTML) cells; the head is text."""
    top = "".join(f"<th>{escaped(name, 60)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f'<td class="{look}">{cell}</td>' for look, cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
