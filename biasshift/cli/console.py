"""What the commands print."""

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from biasshift.analysis.formatting import READING, SAID, effect, reading_table, sweep_table
from biasshift.analysis.per_run import per_run
from biasshift.analysis.verdicts import claims
from biasshift.training import trial

if TYPE_CHECKING:
    import pandas as pd

IDENTITIES = {
    "residual_theorem1": "Theorem 1, centered against block form",
    "residual_identity": "mᵀΔw + Δw₀ = g₀/c",
    "residual_theorem2": "Theorem 2 against the shift of the update itself",
    "residual_bookkeeping": "own + incoming + second order = measured bias shift",
}
SCORES = {
    "train_loss": "loss", "train_error": "error", "valid_loss": "valid. loss", "valid_error": "valid. error",
    "test_loss": "test loss", "test_error": "test error", "valid_error5": "valid. top-5",
}  # fmt: skip
JUDGED = "What these runs say about the paper's claims"
HOW_JUDGED = "Effects are paired by seed, with 95 % intervals; verdicts go by p corrected (Holm) for the variants of a statement."


def printable(text: str) -> str:
    """What comes from run folders, in one line and without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.split()))


def sentence(error: Exception) -> str:
    """What went wrong, for people; of the system's errors, with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}': {error.strerror}."
    return str(error)


def say_comparison(console: Console, table: "pd.DataFrame") -> None:
    """Means and spreads over seeds, activation by activation."""
    found = reading_table(per_run(table))
    shown = Table(
        title="Mean ± SD over seeds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("", *found.columns):
        shown.add_column(column, justify="right" if column else "left", overflow="fold")
    for quantity, row in found.iterrows():
        # In a narrow terminal a cell may break in front of its ±.
        shown.add_row(str(quantity), *(text.replace("± ", "±").replace(" = ", "=") for text in row))
    console.print(shown)
    console.print(READING)


def say_identities(console: Console, table: "pd.DataFrame") -> None:
    """How exact the exact identities are."""
    if not set(IDENTITIES) <= set(table):
        return
    console.print(
        "\nExact identities (largest relative residual over all runs, float64)", style="bold"
    )
    for column, name in IDENTITIES.items():
        console.print(f"  {table[column].max():.1e}  {name}")


def say_paths(console: Console, paths: list[Path]) -> None:
    """Where a figure is."""
    console.print(f"Figure: {paths[0]} (and {paths[-1].suffix[1:].upper()})", soft_wrap=True)


def say_verdicts(console: Console, table: "pd.DataFrame") -> None:
    """The claims by verdict, a line or two each; what speaks against taking them for more is in
    their caveats, which `claims` shows.
    """
    found: Any = claims(table)
    console.print(f"\n{JUDGED}", style="bold")
    console.print(HOW_JUDGED)
    for verdict, words in SAID.items():
        rows = found[found["verdict"] == verdict]
        if len(rows):
            console.print(f"{words} ({len(rows)})")
        for row in rows.itertuples():
            line = f"{row.statement} ({row.source}). {row.statistic}: {effect(row) if row.n else 'not measured'}, n = {row.n}."
            console.print(
                textwrap.fill(
                    printable(line), console.width, initial_indent="  ", subsequent_indent="    "
                ),
                soft_wrap=True,
            )
    console.print("Their caveats: biasshift claims FOLDER")


def say_sweep(console: Console, table: "pd.DataFrame") -> None:
    """The training losses at all learning rates, those that each kind of run is judged at marked by
    a star.
    """
    found = sweep_table(per_run(table))
    shown = Table(
        title="Training loss at every learning rate, mean ± SD over seeds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", *found.columns):
        shown.add_column(str(column), justify="right" if column else "left", overflow="fold")
    for kind, row in found.iterrows():
        shown.add_row(printable(str(kind)), *map(str, row))
    console.print(shown)


def say_runs(console: Console, states: Any, table: Any) -> None:
    """One line per run: its state, its steps, its last numbers."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    hidden = "valid" if "test_loss" in table else "test"
    names = [name for name in SCORES if name in table and not name.startswith(hidden)]
    when = ["written (UTC)"] if console.width >= 100 else []
    for column in ("run", "state", "step", *(SCORES[name] for name in names), *when):
        left = column in ("run", "state")
        shown.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=column != "run"
        )  # numbers stay whole
    for row in states.itertuples():
        own = table[table["run"] == row.run].sort_values("step")
        last = {name: own[name].dropna().tail(1) for name in names}
        numbers = [f"{value.iloc[0]:.3g}" if len(value) else "–" for value in last.values()]
        step = "–" if str(row.last_step) == "<NA>" else f"{row.last_step:,}"
        written = "–" if str(row.updated) == "NaT" else f"{row.updated:%m-%d %H:%M}"
        shown.add_row(
            printable(str(row.run)), str(row.state), step, *numbers, *[written][: len(when)]
        )
    console.print(shown)


# -- how far all runs are ----------------------------------------------------------------------


class Counter:
    """Steps of all runs together, from the reports of each."""

    def __init__(self, total: int):
        self.total, self.began = total, time.monotonic()
        self.steps: dict[str, int] = {}
        self.first: dict[str, int] = {}

    def add(self, report: trial.Progress) -> int:
        """Notes a report; all completed steps, those of an earlier command included."""
        self.first.setdefault(report.run, report.step)
        self.steps[report.run] = report.step
        return self.done

    @property
    def done(self) -> int:
        """Completed steps of all runs."""
        return sum(self.steps.values())

    def rate(self) -> float:
        """Steps per second since the beginning of this command."""
        seconds = time.monotonic() - self.began
        return (self.done - sum(self.first.values())) / seconds if seconds > 0 else 0.0


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[trial.Progress], None]]:
    """Yields what takes every report of every run; ``total`` is the number of steps of all."""
    counter = Counter(total)
    if not console.is_terminal:
        yield _lines(console, counter)
        return
    said = TextColumn("{task.fields[said]}")
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        said,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("training", total=total, said="")
        yield lambda report: bar.update(
            task, completed=counter.add(report), said=_said(report, counter)
        )


def _lines(console: Console, counter: Counter) -> Callable[[trial.Progress], None]:
    tenths = 0

    def line(report: trial.Progress) -> None:
        nonlocal tenths
        done = counter.add(report) * 10 // counter.total
        if done > tenths:
            tenths = done
            console.print(f"{counter.done:,} of {counter.total:,} steps, {_said(report, counter)}")

    return line


def _said(report: trial.Progress, counter: Counter) -> str:
    loss = f", loss {report.loss:.3g}" if math.isfinite(report.loss) else ""
    return f"{counter.rate():.0f} steps/s{loss} ({report.run}, step {report.step:,})"
