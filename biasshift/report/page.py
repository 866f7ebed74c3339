"""Everything on the page: one HTML file that needs no network and trusts no text."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from biasshift.report.charts import charts, theme, variants
from biasshift.report.downsample import ALL_LAYERS, CELL_COLUMNS, CURVE_COLUMNS, Reduced
from biasshift.report.html import as_json, escaped


def page(title: str, intro: str, sections: list[tuple[str, str]], found: Reduced) -> str:
    """Returns the HTML. `sections` are (heading, HTML) behind which the charts' numbers and scripts
    follow.
    """
    scripts = [_vega(), files("biasshift.report").joinpath("page.js").read_text(encoding="utf-8")]
    style = files("biasshift.report").joinpath("page.css").read_text(encoding="utf-8")
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
<body><main><h1>{escaped(title)}</h1>{intro}<nav>{links}</nav>{body}<noscript>The charts need JavaScript.</noscript></main>
<script type="application/json" id="data">{as_json(_data(found))}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body></html>
"""


def _policy(scripts: list[str]) -> str:
    """Nothing is loaded from anywhere, and no script runs but these two, whatever text slipped into
    the page.
    """
    hashes = (
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    )
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _vega() -> str:
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle(vl_version=version)  # pyright: ignore[reportCallIssue]: its stub forgets a default


def _data(found: Reduced) -> dict[str, Any]:
    measured: dict[int, dict[str, list[int]]] = {}
    for position in range(len(found.quantities)):
        cells = [cell for cell in found.cells if cell[0] == position]
        layers = sorted({cell[2] for cell in cells} - {ALL_LAYERS})
        measured[position] = {"layers": layers, "steps": sorted({cell[3] for cell in cells})}
    return {
        "charts": charts(found),
        "variants": variants(found),
        "themes": {"light": theme(found, dark=False), "dark": theme(found, dark=True)},
        "measured": measured,
        "datasets": {
            "cells": {"names": CELL_COLUMNS, "rows": found.cells},
            "curves": {"names": CURVE_COLUMNS, "rows": found.points},
            "labels": {
                "names": ["g", "label"],
                "rows": [[i, one.label] for i, one in enumerate(found.series)],
            },
            "layers": {
                "names": ["l", "layer"],
                "rows": [[i, name] for i, name in enumerate(found.layers)],
            },
            "ranges": {
                "names": ["q", "least", "most", "small"],
                "rows": [[i, *limits] for i, limits in enumerate(found.ranges)],
            },
        },
    }
