"""The sections of the page, each a function that returns HTML. Every text passes through `escaped`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from biasshift.report.charts import CURVES
from biasshift.report.downsample import ALL_LAYERS, Reduced
from biasshift.report.html import escaped, plain
from biasshift.report.markup import faint

_STEEP = 20.0
_PLACES = (
    ("heat", "Layer × step", "Median over units, then mean over runs. Colors end at the 2nd and 98th percentile of the cells. "
     "Point at a cell for its numbers, click it to choose its layer and step."),
    ("across", "Comparison over steps", "At the chosen layer: median over units in each run, then mean ± SD over runs."),
    ("within", "Units at the chosen layer and step",
     "The 5th to 95th percentile over all units of all runs; over runs alone for a quantity of whole layers. "
     "Long tails are cut: the axis ends 3 quartile distances beyond the quartiles."),
)  # fmt: skip


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
    sentences = sentences or [
        "Nothing: every measured step, layer, quantity and run of these folders is in a chart or a table; of units, their percentiles."
    ]
    return "<ul>" + "".join(f"<li>{escaped(sentence, 3000)}</li>" for sentence in sentences) + "</ul>"


def _chart(place: str) -> str:
    return f'<div class="chart" id="{place}"></div>'


def _select(name: str, label: str, options: Iterable[tuple[Any, str]], chosen: Any = None) -> str:
    inner = (
        f'<option value="{value}"{" selected" if value == chosen else ""}>{escaped(plain(text, 120))}</option>' for value, text in options
    )
    return f'<label>{label}<select id="{name}">{"".join(inner)}</select></label>'
