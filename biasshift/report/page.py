"""The page as one HTML file that needs no network and trusts no text."""

import base64
import hashlib
from importlib.resources import files
from typing import Any

import altair
import vl_convert

from biasshift.report.charts import charts, theme, variants
from biasshift.report.downsample import ALL_LAYERS, Cell, ChartData, Point
from biasshift.report.html import as_json, escaped


def html_page(
    title: str, sections: list[tuple[str, str]], data: ChartData, exports: dict[str, Any]
) -> str:
    """Returns the HTML of the whole page: sections, then the numbers of the charts, then scripts.

    Args:
        title: Text, not escaped yet.
        sections: Pairs of a heading, as text, and HTML.
        data: What the charts show.
        exports: Tables that a button offers as a CSV file, by the name that the button has.
    """
    sources = files("biasshift.report")
    style = sources.joinpath("page.css").read_text(encoding="utf-8")
    own = [sources.joinpath(name).read_text(encoding="utf-8") for name in ("tables.js", "page.js")]
    scripts = [_vega(), "\n".join(own)]
    numbered = [
        (f"part-{position}", escaped(heading), content)
        for position, (heading, content) in enumerate(sections)
    ]
    links = "".join(f'<a href="#{name}">{heading}</a> ' for name, heading, _ in numbered)
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
        for name, heading, content in numbered
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title><style>{style}</style></head>
<body><main><h1>{escaped(title)}</h1><nav>{links}</nav>{body}\
<noscript>The charts need JavaScript.</noscript></main>
<script type="application/json" id="data">{as_json(_data(data, exports))}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body></html>
"""


def _policy(scripts: list[str]) -> str:
    """Nothing is loaded from anywhere, and no script runs but these two, whatever text slipped into
    the page.
    """
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed, as JavaScript."""
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle(vl_version=version)  # pyright: ignore[reportCallIssue]: its stub forgets a default


def _data(data: ChartData, exports: dict[str, Any]) -> dict[str, Any]:
    measured = {}
    for position in range(len(data.quantities)):
        cells = [cell for cell in data.cells if cell.q == position]
        layers = sorted({cell.l for cell in cells} - {ALL_LAYERS})
        measured[position] = {"layers": layers, "steps": sorted({cell.s for cell in cells})}
    tables = {
        "cells": (Cell._fields, data.cells),
        "curves": (Point._fields, data.points),
        "labels": (["g", "label"], enumerate(group.label for group in data.groups)),
        "layers": (["l", "layer"], enumerate(data.layers)),
        "ranges": (
            ["q", "least", "most", "small"],
            ((i, *limits) for i, limits in enumerate(data.ranges)),
        ),
    }
    return {
        "charts": charts(data),
        "variants": variants(data),
        "themes": {"light": theme(data, dark=False), "dark": theme(data, dark=True)},
        "measured": measured,
        "exports": exports,
        "datasets": {
            name: {"names": names, "rows": list(rows)} for name, (names, rows) in tables.items()
        },
    }
