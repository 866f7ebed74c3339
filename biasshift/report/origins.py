"""Where each run came from: its options, command, commit, device, seed and state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift.report.html import escaped
from biasshift.report.markup import folded, table
from biasshift.runs.provenance import shortened
from biasshift.runs.schema import read_config, read_json

if TYPE_CHECKING:
    import pandas as pd

MOST_RUNS = 300
MOST_OPEN = 12  # rows that are seen without a click
MOST_BYTES = 1_000_000  # of all rows
MOST_CONFIG = 3000  # characters of one run's options


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
    head = ["run", "state", "last step", "seed", "device", "commit or version", "started", "options"]
    missing, note = len(folders) - len(rows), ""
    if len(rows) > 1 and len(commands := {command for command, _, _ in rows}) == 1:
        note, rows = f'<p class="faint">The command of all runs: {commands.pop()}</p>', [("", *row[1:]) for row in rows]
    cells = [[*row, ("", folded("command, options" if command else "options", command + details))] for command, details, row in rows]
    whole = table(head, cells)
    whole = folded(f"{len(rows)} runs", whole) if len(rows) > MOST_OPEN else whole
    return note + whole, [f"The options and origins of {missing} of {len(folders)} runs, the last by name."] if missing else []


def _row(folder: Path, state: pd.Series) -> tuple[str, str, list[tuple[str, str]]]:
    """The command, the options, and the cells of the other columns."""
    import pandas as pd

    origin, config = read_json(folder, "provenance.json", {}), read_config(folder)
    others = {name: value for name, value in origin.items() if name not in ("command", "commit", "dirty", "device", "seed", "started")}
    commit = str(origin.get("commit") or origin.get("version") or "–")[:12] + (" (changed)" if origin.get("dirty") else "")
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
    return " ".join(shortened(str(word)) for word in command) if isinstance(command, list) else shortened(str(command or "–"))


def _pretty(options: dict[str, Any]) -> str:
    options = {name: shortened(value) if isinstance(value, str) else value for name, value in options.items()}
    return escaped(json.dumps(options, indent=1, ensure_ascii=False), MOST_CONFIG)
