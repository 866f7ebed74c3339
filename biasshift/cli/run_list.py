"""The command ``biasshift runs``: a line per run, as far as it got. It needs no PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from biasshift.cli.console import print_json
from biasshift.escapes import visible
from biasshift.runs.reader import read_runs, run_states

SCORES = {  # column of the table → its heading
    "train_loss": "loss",
    "train_error": "error",
    "valid_loss": "valid. loss",
    "valid_error": "valid. error",
    "test_loss": "test loss",
    "test_error": "test error",
    "valid_error5": "valid. top-5",
}


def list_runs(console: Console, paths: Sequence[Path], as_json: bool = False) -> None:
    """Prints one line per run in or below the folders; of their rows, it reads what it shows."""
    table = read_runs(*paths, columns=list(SCORES), units=False, absent="skip")
    states = run_states(*paths)
    if not as_json:
        print_runs(console, states, table)
        return
    scores = [name for name in SCORES if name in table]
    # The last value that there is of each.
    last = table.sort_values("step", kind="stable").groupby("run", observed=True)[scores].last()
    print_json(console, states.merge(last.reset_index(), on="run", how="left"))


def print_runs(console: Console, states: pd.DataFrame, table: pd.DataFrame) -> None:
    """Prints one line per run: its state, its last step, its last scores, and when it was written.

    Scores on test data take the place of those on validation data. The time needs 100 columns.

    Args:
        states: The table of `biasshift.runs.reader.run_states`.
        table: The rows of the same runs.
    """
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    hidden = "valid" if "test_loss" in table else "test"
    names = [name for name in SCORES if name in table and not name.startswith(hidden)]
    when = ["written (UTC)"] if console.width >= 100 else []
    for column in ("run", "state", "step", *(SCORES[name] for name in names), *when):
        left = column in ("run", "state")
        # Numbers stay whole.
        shown.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=column != "run"
        )
    rows: Any = states.itertuples()
    for row in rows:
        own: Any = table[table["run"] == row.run]
        own = own.sort_values("step")
        last = [own[name].dropna().tail(1) for name in names]
        numbers = [f"{value.iloc[0]:.3g}" if len(value) else "–" for value in last]
        step = "–" if row.last_step is pd.NA else f"{row.last_step:,}"
        written = "–" if row.updated is pd.NaT else f"{row.updated:%m-%d %H:%M}"
        cells = [visible(str(row.run)), str(row.state), step, *numbers, *[written][: len(when)]]
        shown.add_row(*cells)
    console.print(shown)
