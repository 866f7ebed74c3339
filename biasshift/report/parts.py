"""The sections of the page, each a function that returns HTML. Every text passes through `escaped`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from biasshift.report.charts import CURVES
from biasshift.report.reducing import ALL_LAYERS, Reduced
from biasshift.report.text import escaped, number, plain

if TYPE_CHECKING:
    import pandas as pd

MOST_CLAIMS = 200
_STEEP = 20.0
_BADGES = {"supported": "supported", "not supported": "contrary", "undecided": "undecided"}
_CLAIM_COLUMNS = ("claim", "statement", "source", "statistic", "effect", "low", "high", "n", "p", "verdict", "caveat")
_PLACES = (
    ("heat", "Layer × step", "Median over units, then mean over runs. Colors end at the 2nd and 98th percentile of the cells. "
     "Point at a cell for its numbers, click it to choose its layer and step."),
    ("across", "Comparison over steps", "At the chosen layer: median over units in each run, then mean ± SD over runs."),
    ("within", "Units at the chosen layer and step",
     "The 5th to 95th percentile over all units of all runs; over runs alone for a quantity of whole layers."),
)  # fmt: skip


def claims_part(found: pd.DataFrame, said: Sequence[str]) -> str:
    """The verdicts: one row per claim, then the same as sentences."""
    others = [name for name in found if name not in _CLAIM_COLUMNS]
    head = ["verdict", "claim", "effect [interval]", "n", "p", "statistic", "caveat"]
    rows = [_claim(row, others) for row in found.head(MOST_CLAIMS).to_dict("records")]
    words = "".join(f"<li>{escaped(sentence, 1000)}</li>" for sentence in said[:MOST_CLAIMS])
    more = f"{len(found) - MOST_CLAIMS} more claims are not shown." if len(found) > MOST_CLAIMS else ""
    note = "Effects with 95 % intervals over paired seeds; the verdict goes by p_holm, corrected within a family of claims. "
    counts = "; ".join(f"{count} {verdict}" for verdict, count in found["verdict"].value_counts().items())
    verdicts = table(head, rows)
    if set(found["verdict"]) <= {"undecided"}:
        verdicts = f"<details><summary>All of them</summary>{verdicts}</details>"
    return faint(f"{counts}. {note}{more}") + verdicts + f"<details><summary>In sentences</summary><ul>{words}</ul></details>"


def _claim(row: dict[Any, Any], others: Sequence[Any]) -> list[tuple[str, str]]:
    verdict = str(row["verdict"])
    interval = f" [{number(row['low'])}, {number(row['high'])}]" if row["low"] == row["low"] else ""
    more = "; ".join(f"{name} = {number(row[name]) if isinstance(row[name], float) else row[name]}" for name in others)
    more = f"<details><summary>more</summary>{escaped(more, 1000)}</details>" if more else ""
    return [
        ("", f'<span class="badge {_BADGES.get(verdict, "undecided")}">{escaped(verdict)}</span>'),
        ("text", f'{escaped(row["statement"])} <span class="faint">({escaped(row["source"])})</span>'),
        ("number", number(row["effect"]) + interval),
        ("number", escaped(row["n"])),
        ("number", number(row["p"], 2)),
        ("text", escaped(row["statistic"])),
        ("text", escaped(row["caveat"]) + more),
    ]


def reading_part(found: pd.DataFrame, how: str) -> str:
    """`biasshift.summary.reading_table`, and how to read it."""
    rows = [
        [("text", escaped(name)), *(("number", escaped(text.replace("-", "−"))) for text in row)]
        for name, row in zip(found.index, found.to_numpy(), strict=True)
        if set(row) != {"–"}
    ]
    return faint(how) + table(["", *map(str, found.columns)], rows)


def curves_part(found: Reduced) -> str:
    """The learning curves: loss, error, and one chart for all else that was recorded of the whole network."""
    if not found.points:
        return faint("These runs recorded nothing about the whole network.")
    epochs = [("epoch", "epoch")] if any(point[4] is not None for point in found.points) else []
    shown = ""
    for metric, place in CURVES.items():
        if metric in found.metrics:
            shown += f"<div><h3>{metric.capitalize()}</h3>{_chart(place)}</div>"
    others = [(str(position), name) for position, name in enumerate(found.metrics) if name not in CURVES]
    if others:
        shown += f"<div>{_select('metric', 'another quantity', others)}{_chart('curves-other')}</div>"
    note = "Mean over runs (line) ± SD over runs (ribbon); training solid, validation dashed, test dotted. "
    note += "n is the number of runs. Point at a line for its numbers."
    controls = _select("against", "against", [*epochs, ("step", "step")])
    controls += _select("scale", "scale", [("linear", "linear"), ("log", "logarithmic")], "log" if _is_steep(found) else "linear")
    return f'{faint(note)}<div class="controls">{controls}</div><div class="charts">{shown}</div>'


def _is_steep(found: Reduced) -> bool:
    """Whether a loss falls so far that its end could not be seen on a linear scale."""
    losses = [point[5] for point in found.points if found.metrics[point[0]] == "loss"]
    return bool(losses) and min(losses) > 0 and max(losses) > _STEEP * min(losses)


def layers_part(found: Reduced) -> str:
    """What is looked at, the heat map, the comparison over steps, and the distribution over units."""
    if not found.cells:
        return faint("These runs recorded nothing about layers or units.")
    steps = sorted({cell[3] for cell in found.cells})
    first = found.quantities.index("mean") if "mean" in found.quantities else 0
    controls = [
        _select("quantity", "quantity", enumerate(found.quantities), first),
        _select("layer", "layer", [(ALL_LAYERS, "all layers"), *enumerate(found.layers)]),
        _select("step", "step", [(step, f"{step:,}") for step in steps], steps[-1]),
        _select("colors", "colors of the heat map", [("linear", "linear"), ("compressed", "compressed (logarithmic)")]),
        _select("series", "runs in the heat map", [(position, one.label) for position, one in enumerate(found.series)]),
    ]
    shown = "".join(f"<div><h3>{heading}</h3>{faint(text)}{_chart(place)}</div>" for place, heading, text in _PLACES)
    return f'<div class="controls sticky">{"".join(controls)}</div><div class="charts">{shown}</div>'


def left_out_part(sentences: Sequence[str]) -> str:
    """What the page does not show."""
    sentences = sentences or ["Nothing: every measured step, layer, quantity and run of these folders is on this page."]
    return "<ul>" + "".join(f"<li>{escaped(sentence, 3000)}</li>" for sentence in sentences) + "</ul>"


def faint(text: str) -> str:
    return f'<p class="faint">{escaped(text, 2000)}</p>' if text else ""


def table(head: Iterable[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table of (class, HTML) cells; the head is text."""
    top = "".join(f"<th>{escaped(name, 60)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(place: str) -> str:
    return f'<div class="chart" id="{place}"></div>'


def _select(name: str, label: str, options: Iterable[tuple[Any, str]], chosen: Any = None) -> str:
    inner = (
        f'<option value="{value}"{" selected" if value == chosen else ""}>{escaped(plain(text, 120))}</option>' for value, text in options
    )
    return f'<label>{label}<select id="{name}">{"".join(inner)}</select></label>'
