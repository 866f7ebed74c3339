"""How this project's docstrings become Markdown: doctests are code, and reStructuredText's simple
tables are tables.
"""

import re
from itertools import pairwise
from typing import Any

import griffe

RULE = re.compile(r"^=+(  +=+)+$")


class AsMarkdown(griffe.Extension):
    """Rewrites every docstring that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    return fenced(tabled(text.splitlines()))


def fenced(lines: list[str]) -> str:
    """Doctests, up to the next empty line, between fences: without them ``>>>`` is a quotation of a
    quotation of a quotation.
    """
    found: list[str] = []
    inside = False
    for line in [*lines, ""]:
        if line.startswith(">>> ") and not inside:
            found.append("```pycon")
            inside = True
        if not line.strip() and inside:
            found.append("```")
            inside = False
        found.append(line)
    return "\n".join(found).rstrip()


def tabled(lines: list[str]) -> list[str]:
    """Simple tables, whose columns stand below rules of ``=``, as tables of pipes."""
    rules = [number for number, line in enumerate(lines) if RULE.match(line)]
    if len(rules) < 3:
        return lines
    top, head, bottom = rules[:3]
    starts = [match.start() for match in re.finditer(r"=+", lines[top])]

    def row(line: str) -> str:
        cells = [line[begin:end].strip() for begin, end in pairwise([*starts, len(line) + 1])]
        return f"| {' | '.join(cells)} |"

    titles = [row(line) for line in lines[top + 1 : head]]
    rows = [row(line) for line in lines[head + 1 : bottom]]
    return [
        *lines[:top],
        *titles,
        "|" + " --- |" * len(starts),
        *rows,
        *tabled(lines[bottom + 1 :]),
    ]
