"""How far all runs are: a live bar on a terminal, ten plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from biasshift.training import trial as trials


class Counter:
    """Steps of all runs together, from the reports of each."""

    def __init__(self, total: int):
        self.total, self.began = total, time.monotonic()
        self.steps: dict[str, int] = {}
        self.first: dict[str, int] = {}

    def add(self, report: trials.Progress) -> int:
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
def progress(console: Console, total: int) -> Iterator[Callable[[trials.Progress], None]]:
    """Yields what takes every report of every run; ``total`` is the number of steps of all."""
    counter = Counter(total)
    if not console.is_terminal:
        yield _lines(console, counter)
        return
    said = TextColumn("{task.fields[said]}")
    columns = (BarColumn(), TaskProgressColumn(), said, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("training", total=total, said="")
        yield lambda report: bar.update(task, completed=counter.add(report), said=_said(report, counter))


def _lines(console: Console, counter: Counter) -> Callable[[trials.Progress], None]:
    tenths = 0

    def line(report: trials.Progress) -> None:
        nonlocal tenths
        done = counter.add(report) * 10 // counter.total
        if done > tenths:
            tenths = done
            console.print(f"{counter.done:,} of {counter.total:,} steps, {_said(report, counter)}")

    return line


def _said(report: trials.Progress, counter: Counter) -> str:
    loss = f", loss {report.loss:.3g}" if math.isfinite(report.loss) else ""
    return f"{counter.rate():.0f} steps/s{loss} ({report.run}, step {report.step:,})"
