"""Formulas of the pages as MathML, which browsers draw by themselves: no script, no network.

A hook of MkDocs. Arithmatex marks the formulas between dollar signs, which GitHub shows, too.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">'
    r"(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>",
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """Returns the HTML of a page with its marked formulas as MathML."""
    return MARKED.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    inline = match["inline"]
    text = html.unescape(inline if inline is not None else match["block"]).strip()
    display = "inline" if inline is not None else "block"
    formula = convert(text, display=display)
    return formula if inline is not None else f'<div class="formula">{formula}</div>'
