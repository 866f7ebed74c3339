"""Printing: a console that text from outside does nothing to, and how far all runs are."""

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress as Bar,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from biasshift.escapes import visible
from biasshift.progress import Progress, progress as shown

if TYPE_CHECKING:  # lists of runs need a console, too, and no PyTorch
    import pandas as pd

    from biasshift.training import trial


class Terminal(Console):
    """A console that shows text from outside by its signs, and obeys none of them.

    Every string that is printed or stands in a table passes through here; a `Text` does not, and is
    made of `visible` strings.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Converts a string to what is printed. Line breaks stay, and nothing else that acts."""
        return super().render_str(visible(text, keep="\n\t"), **options)


def print_wrapped(console: Console, text: str, indent: str, hanging: str) -> None:
    """Prints text from run folders in lines as wide as the terminal.

    Args:
        indent: What the first line begins with.
        hanging: What all others begin with.
    """
    lines = textwrap.wrap(
        visible(text), console.width, initial_indent=indent, subsequent_indent=hanging
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)


def print_json(console: Console, table: "pd.DataFrame") -> None:
    """Prints a table as a JSON list of objects, in ASCII; what is missing is null."""
    text = table.to_json(orient="records", date_format="iso", double_precision=15, indent=1)
    console.print(Text(text or "[]"), soft_wrap=True)


def print_paths(console: Console, paths: list[Path]) -> None:
    """Prints where a figure is, whose files differ only in their suffix."""
    first = visible(str(paths[0]))
    console.print(f"Figure: {first} (and {paths[-1].suffix[1:].upper()})", soft_wrap=True)


def watched(console: Console, title: str) -> Progress:
    """Returns what a command reports to; a terminal shows it, once it has lasted 3 seconds."""
    shows = None if console.is_terminal and not console.quiet else False
    return shown(title, shows, console.file)


# -- how far all runs are --------------------------------------------------------------------------


class Counter:
    """Steps of all runs together, counted from the reports of each.

    Args:
        total: The number of steps of all runs.
    """

    def __init__(self, total: int):
        self.total, self.began = total, time.monotonic()
        self.steps: dict[str, int] = {}
        self.first: dict[str, int] = {}

    def add(self, report: "trial.Progress") -> int:
        """Counts a report, and returns the completed steps of all runs.

        Those that an earlier command completed are among them.
        """
        self.first.setdefault(report.run, report.step)
        self.steps[report.run] = report.step
        return self.done

    @property
    def done(self) -> int:
        """Completed steps of all runs."""
        return sum(self.steps.values())

    def rate(self) -> float:
        """Returns steps per second since the beginning of this command.

        Steps that an earlier command completed are not among them.
        """
        seconds = time.monotonic() - self.began
        return (self.done - sum(self.first.values())) / seconds if seconds > 0 else 0.0

    def status(self, report: "trial.Progress") -> str:
        """Returns the speed of all runs, and the loss and the step of the one that reports."""
        loss = f", loss {report.loss:.3g}" if math.isfinite(report.loss) else ""
        return f"{self.rate():.0f} steps/s{loss} ({visible(report.run)}, step {report.step:,})"


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[["trial.Progress"], None]]:
    """Yields the function that takes the reports of all runs and shows how far they are.

    A terminal gets a bar; a file or a pipe gets a line for every tenth of the steps.

    Args:
        total: The number of steps of all runs together.
    """
    counter = Counter(total)
    if not console.is_terminal:
        yield _lines(console, counter)
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("training", total=total, status="")
        yield lambda report: bar.update(
            task, completed=counter.add(report), status=counter.status(report)
        )


def _lines(console: Console, counter: Counter) -> Callable[["trial.Progress"], None]:
    printed = 0  # tenths

    def print_line(report: "trial.Progress") -> None:
        nonlocal printed
        tenths = counter.add(report) * 10 // counter.total
        if tenths > printed:
            printed = tenths
            status = counter.status(report)
            console.print(f"{counter.done:,} of {counter.total:,} steps, {status}")

    return print_line
