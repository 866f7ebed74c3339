"""The sections of the page that need no statistics: curves, layers, runs, and what is left out.

Each section is a function that returns HTML. Every text in it passes through `escaped`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from biasshift.report.charts import CURVES
from biasshift.report.downsample import ALL_LAYERS, ChartData
from biasshift.report.html import details, escaped, note, plain, table
from biasshift.report.words import in_words
from biasshift.runs.provenance import short_argument
from biasshift.runs.schema import read_config, read_json

MAX_RUNS = 300
MAX_OPEN = 12  # rows that are seen without a click
MAX_BYTES = 1_000_000  # of all rows
MAX_CONFIG = 3000  # characters of one run's options
_STEEP = 20.0  # first loss over last, from which on a linear scale hides the end
_CURVES_NOTE = """\
Mean over runs (line) ± SD over runs (ribbon); training solid, validation dashed, test dotted. \
n is the number of runs. Point at a line for its numbers."""
_OTHERS_NOTE = "Axis and scale are those chosen above."
_LAYER_CHARTS = (  # place, heading, note
    (
        "heat",
        "Layer × step",
        "Median over units, then mean over runs. Colors end at the 2nd and 98th percentile of the "
        "cells. Point at a cell for its numbers; click it to choose its layer and step.",
    ),
    (
        "across",
        "Comparison over steps",
        "At the chosen layer: median over units in each run, then mean ± SD over runs.",
    ),
    (
        "within",
        "Units at the chosen layer and step",
        "The 5th to 95th percentile over all units of all runs; over runs alone for a quantity of "
        "whole layers. Long tails are cut: the axis ends 3 quartile distances beyond the "
        "quartiles.",
    ),
)
_NOTHING_LEFT_OUT = """\
Nothing: every measured step, layer, quantity and run of these folders is in a chart or a table; \
of units, their percentiles."""
_HEAD = ("run", "state", "last step", "seed", "device", "commit or version", "started", "options")


# -- charts ----------------------------------------------------------------------------------------


def first_curves(data: ChartData) -> str:
    """Returns the first learning curve, with the choices of all: the loss, if it was recorded.

    The loss begins on a logarithmic scale where its end could not be seen on a linear one.
    """
    if not data.points:
        return note("These runs recorded nothing about the whole network.")
    epochs = [("epoch", "epoch")] if any(point.epoch is not None for point in data.points) else []
    scales = [("linear", "linear"), ("log", "logarithmic")]
    controls = _select("against", "against", [*epochs, ("step", "step")])
    controls += _select("scale", "scale", scales, "log" if _is_steep(data) else "linear")
    chart = _curves(data)[0]
    return f'{chart}<div class="controls">{controls}</div>{note(_CURVES_NOTE)}'


def other_curves(data: ChartData) -> str:
    """Returns the other learning curves; where there is none, the text is empty."""
    shown = _curves(data)[1:]
    return f"{note(_OTHERS_NOTE)}{_charts(shown)}" if shown else ""


def _curves(data: ChartData) -> list[str]:
    shown = [
        f"<h3>{metric.capitalize()}</h3>{_chart(place)}"
        for metric, place in CURVES.items()
        if metric in data.metrics
    ]
    others = [(position, name) for position, name in enumerate(data.metrics) if name not in CURVES]
    if others:
        shown.append(_select("metric", "another quantity", others) + _chart("curves-other"))
    return shown


def _is_steep(data: ChartData) -> bool:
    """Whether a loss falls so far that its end could not be seen on a linear scale."""
    losses = [point.mean for point in data.points if data.metrics[point.metric] == "loss"]
    return bool(losses) and min(losses) > 0 and max(losses) > _STEEP * min(losses)


def layers_section(data: ChartData) -> str:
    """Returns the charts of layers and units: the heat map, the comparison, the distribution.

    One row of choices serves all three: quantity, layer, step, colors, and the runs in the heat
    map. It begins with all layers at the last step, and with the mean where that was measured.
    """
    if not data.cells:
        return note("These runs recorded nothing about layers or units.")
    steps = sorted({cell.s for cell in data.cells})
    mean = in_words("mean")
    first = data.quantities.index(mean) if mean in data.quantities else 0
    layers = [(ALL_LAYERS, "all layers"), *enumerate(data.layers)]
    colors = [("linear", "linear"), ("compressed", "compressed (logarithmic)")]
    labels = enumerate(group.label for group in data.groups)
    controls = _select("quantity", "quantity", enumerate(data.quantities), first)
    controls += _select("layer", "layer", layers)
    controls += _select("step", "step", [(step, f"{step:,}") for step in steps], steps[-1])
    controls += _select("colors", "colors of the heat map", colors)
    controls += _select("series", "runs in the heat map", labels)
    shown = [
        f"<h3>{heading}</h3>{note(text)}{_chart(place)}" for place, heading, text in _LAYER_CHARTS
    ]
    return f'<div class="controls sticky">{controls}</div>{_charts(shown)}'


def _chart(place: str) -> str:
    return f'<div class="chart" id="{place}"></div>'


def _charts(shown: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in shown)}</div>'


def _select(name: str, label: str, options: Iterable[tuple[Any, str]], chosen: Any = None) -> str:
    inner = "".join(
        f'<option value="{value}"{" selected" * (value == chosen)}>'
        f"{escaped(plain(text, 120))}</option>"
        for value, text in options
    )
    return f'<label>{label}<select id="{name}">{inner}</select></label>'


def left_out_section(sentences: Sequence[str]) -> str:
    """Returns the list of what the page does not show, or a sentence that it shows everything."""
    items = (f"<li>{escaped(sentence, 3000)}</li>" for sentence in sentences or [_NOTHING_LEFT_OUT])
    return f"<ul>{''.join(items)}</ul>"


# -- where each run came from ----------------------------------------------------------------------


def runs_section(folders: Sequence[Path], states: pd.DataFrame, left_out: list[str]) -> str:
    """Returns the table of runs: state, seed, device, code version, command and options.

    A command that all runs share stands once, above the table.

    Args:
        folders: The run folders.
        states: A row of `run_states` for each of them.
        left_out: Gets a sentence where the table would be longer than `MAX_RUNS` or `MAX_BYTES`.
    """
    rows: list[tuple[str, str, list[tuple[str, str]]]] = []
    size = 0
    for folder, (_, state) in zip(folders, states.iterrows(), strict=True):
        row = _row(folder, state)
        size += sum(len(text.encode()) for text in (*row[:2], *(cell for _, cell in row[2])))
        if len(rows) == MAX_RUNS or size > MAX_BYTES:
            left_out.append(
                f"The options and origins of {len(folders) - len(rows)} of {len(folders)} runs, "
                "the last by name."
            )
            break
        rows.append(row)
    above = ""
    if len(rows) > 1 and len(commands := {command for command, _, _ in rows}) == 1:
        above = f'<p class="faint">The command of all runs: {commands.pop()}</p>'
        rows = [("", *row[1:]) for row in rows]
    cells = [
        [*row, ("", details("command, options" if command else "options", command + options))]
        for command, options, row in rows
    ]
    whole = table(_HEAD, cells)
    return above + (details(f"{len(rows)} runs", whole) if len(rows) > MAX_OPEN else whole)


def _row(folder: Path, state: pd.Series) -> tuple[str, str, list[tuple[str, str]]]:
    """The command, the options, and the cells of the other columns."""
    origin, config = read_json(folder, "provenance.json", {}), read_config(folder)
    in_columns = ("command", "commit", "dirty", "device", "seed", "started")
    others = {name: value for name, value in origin.items() if name not in in_columns}
    commit = str(origin.get("commit") or origin.get("version") or "–")[:12]
    started = state["started"]
    cells = [
        ("", escaped(state["run"], 80)),
        ("", escaped(state["state"])),
        ("number", "–" if state["last_step"] is pd.NA else escaped(state["last_step"])),
        ("number", escaped(origin.get("seed", config.get("seed", "–")), 30)),
        ("", escaped(origin.get("device", "–"), 80)),
        ("", escaped(commit + " (changed)" * bool(origin.get("dirty")))),
        ("", "–" if started is pd.NaT else f"{started:%Y-%m-%d %H:%M} UTC"),
    ]
    command = f"<code>{escaped(_command(origin.get('command')))}</code>"
    return command, _pretty(config) + (_pretty(others) if others else ""), cells


def _command(command: Any) -> str:
    """Without the folders of somebody's machine."""
    if isinstance(command, list):
        return " ".join(short_argument(str(word)) for word in command)
    return short_argument(str(command or "–"))


def _pretty(options: dict[str, Any]) -> str:
    options = {
        name: short_argument(value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    return f"<pre>{escaped(json.dumps(options, indent=1, ensure_ascii=False), MAX_CONFIG)}</pre>"
