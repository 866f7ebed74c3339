"""The sections of the page, each a function that returns HTML. Every text passes through `escaped`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift.report.charts import CURVES
from biasshift.report.downsample import ALL_LAYERS, Reduced
from biasshift.report.html import escaped, faint, folded, plain, table
from biasshift.runs.provenance import shortened
from biasshift.runs.schema import read_config, read_json

if TYPE_CHECKING:
    import pandas as pd

_STEEP = 20.0
_PLACES = (
    ("heat", "Layer × step", "Median over units, then mean over runs. Colors end at the 2nd and "
                             "98th percentile of the cells. "
     "Point at a cell for its numbers, click it to choose its layer and step."),
    ("across", "Comparison over steps", "At the chosen layer: median over units in each run, then "
                                        "mean ± SD over runs."),
    ("within", "Units at the chosen layer and step",
     "The 5th to 95th percentile over all units of all runs; over runs alone for a quantity of "
     "whole layers. "
     "Long tails are cut: the axis ends 3 quartile distances beyond the quartiles."),
)  # fmt: skip
MOST_RUNS = 300
MOST_OPEN = 12  # rows that are seen without a click
MOST_BYTES = 1_000_000  # of all rows
MOST_CONFIG = 3000  # characters of one run's options


def curves_part(found: Reduced) -> str:
    """The learning curves: loss, error, and one chart for all else that was recorded of the whole
    network.
    """
    if not found.points:
        return faint("These runs recorded nothing about the whole network.")
    epochs = [("epoch", "epoch")] if any(point[4] is not None for point in found.points) else []
    shown = ""
    for metric, place in CURVES.items():
        if metric in found.metrics:
            shown += f"<div><h3>{metric.capitalize()}</h3>{_chart(place)}</div>"
    others = [
        (str(position), name) for position, name in enumerate(found.metrics) if name not in CURVES
    ]
    if others:
        shown += (
            f"<div>{_select('metric', 'another quantity', others)}{_chart('curves-other')}</div>"
        )
    note = "Mean over runs (line) ± SD over runs (ribbon); training solid, validation dashed, test dotted. "
    note += "n is the number of runs. Point at a line for its numbers."
    controls = _select("against", "against", [*epochs, ("step", "step")])
    controls += _select(
        "scale",
        "scale",
        [("linear", "linear"), ("log", "logarithmic")],
        "log" if _is_steep(found) else "linear",
    )
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
        _select(
            "colors",
            "colors of the heat map",
            [("linear", "linear"), ("compressed", "compressed (logarithmic)")],
        ),
        _select(
            "series",
            "runs in the heat map",
            [(position, one.label) for position, one in enumerate(found.series)],
        ),
    ]
    shown = "".join(
        f"<div><h3>{heading}</h3>{faint(text)}{_chart(place)}</div>"
        for place, heading, text in _PLACES
    )
    return (
        f'<div class="controls sticky">{"".join(controls)}</div><div class="charts">{shown}</div>'
    )


def left_out_part(sentences: Sequence[str]) -> str:
    """What the page does not show."""
    sentences = sentences or [
        "Nothing: every measured step, layer, quantity and run of these folders is in a chart or a "
        "table; of units, their percentiles."
    ]
    return (
        "<ul>" + "".join(f"<li>{escaped(sentence, 3000)}</li>" for sentence in sentences) + "</ul>"
    )


def _chart(place: str) -> str:
    return f'<div class="chart" id="{place}"></div>'


def _select(name: str, label: str, options: Iterable[tuple[Any, str]], chosen: Any = None) -> str:
    inner = (
        f'<option value="{value}"{" selected" if value == chosen else ""}>{escaped(plain(text, 120))}</option>'
        for value, text in options
    )
    return f'<label>{label}<select id="{name}">{"".join(inner)}</select></label>'


# -- where each run came from ------------------------------------------------------------------


def origins_part(folders: Sequence[Path], states: pd.DataFrame) -> tuple[str, list[str]]:
    """Returns the table of runs, and sentences about those that are not in it."""
    rows: list[tuple[str, str, list[tuple[str, str]]]] = []
    size = 0
    for folder, (_, state) in zip(folders, states.iterrows(), strict=True):
        row = _row(folder, state)
        size += sum(len(text.encode()) for text in (*row[:2], *(cell for _, cell in row[2])))
        if len(rows) == MOST_RUNS or size > MOST_BYTES:
            break
        rows.append(row)
    head = [
        "run",
        "state",
        "last step",
        "seed",
        "device",
        "commit or version",
        "started",
        "options",
    ]
    missing, note = len(folders) - len(rows), ""
    if len(rows) > 1 and len(commands := {command for command, _, _ in rows}) == 1:
        note, rows = (
            f'<p class="faint">The command of all runs: {commands.pop()}</p>',
            [("", *row[1:]) for row in rows],
        )
    cells = [
        [*row, ("", folded("command, options" if command else "options", command + details))]
        for command, details, row in rows
    ]
    whole = table(head, cells)
    whole = folded(f"{len(rows)} runs", whole) if len(rows) > MOST_OPEN else whole
    return note + whole, [
        f"The options and origins of {missing} of {len(folders)} runs, the last by name."
    ] if missing else []


def _row(folder: Path, state: pd.Series) -> tuple[str, str, list[tuple[str, str]]]:
    """The command, the options, and the cells of the other columns."""
    import pandas as pd

    origin, config = read_json(folder, "provenance.json", {}), read_config(folder)
    others = {
        name: value
        for name, value in origin.items()
        if name not in ("command", "commit", "dirty", "device", "seed", "started")
    }
    commit = str(origin.get("commit") or origin.get("version") or "–")[:12] + (
        " (changed)" if origin.get("dirty") else ""
    )
    details = f"<pre>{_pretty(config)}</pre>" + (f"<pre>{_pretty(others)}</pre>" if others else "")
    started = state["started"]
    cells = [
        ("", escaped(state["run"], 80)),
        ("", escaped(state["state"])),
        ("number", "–" if state["last_step"] is pd.NA else escaped(state["last_step"])),
        ("number", escaped(origin.get("seed", config.get("seed", "–")), 30)),
        ("", escaped(origin.get("device", "–"), 80)),
        ("", escaped(commit)),
        ("", "–" if started is pd.NaT else f"{started:%Y-%m-%d %H:%M} UTC"),
    ]
    return f"<code>{escaped(_command(origin.get('command')))}</code>", details, cells


def _command(command: Any) -> str:
    """Without the folders of somebody's machine."""
    return (
        " ".join(shortened(str(word)) for word in command)
        if isinstance(command, list)
        else shortened(str(command or "–"))
    )


def _pretty(options: dict[str, Any]) -> str:
    options = {
        name: shortened(value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    return escaped(json.dumps(options, indent=1, ensure_ascii=False), MOST_CONFIG)
