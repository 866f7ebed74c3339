"""How far a long call is, on one line of the terminal or in a notebook.

Nothing here keeps a state of the terminal: no thread ticks, the cursor stays visible, and no stream
is replaced. The line is drawn when work advances, and the cursor waits at its beginning, so that
whatever is printed next takes its place.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

AFTER = 3.0  # seconds of work, before a line is shown that nobody asked for
EVERY = 0.2  # seconds between two drawings
LINES = 10  # that a file or a pipe gets, where they are asked for
ERASED = "\r\x1b[2K"  # the line the cursor is on

_ended: dict[tuple[int, int], float] = {}  # when the last call from a place in the code ended


class Progress:
    """What a long call reports to; this one shows nothing, and costs nothing.

    Attributes:
        done: how much of the work is completed.
        total: all of it; None where it is not known.
    """

    done, total = 0, None

    def __bool__(self) -> bool:
        """Whether anything may be shown: what is made for showing alone need not be made."""
        return False

    def begin(self, total: int | None, unit: str, line: str = "") -> None:
        """Begins a part of the work.

        Args:
            total: how many units of it there are; None where that is not known.
            unit: what is counted, in the plural.
            line: what is known before it starts, in a sentence or two.
        """

    def advance(self, count: int = 1) -> None:
        """Adds completed units."""

    def reach(self, units: float) -> None:
        """Says how many units beyond those that are completed the work has come."""

    def pause(self) -> None:
        """Takes the line away until it is drawn again."""

    def close(self) -> None:
        """Takes the line away."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Show = bool | None | Progress
SILENT = Progress()


class Shown(Progress):
    """Progress that is shown, on stderr or in a notebook.

    Args:
        title: what is going on.
        after: seconds until it is shown.
        file: a text stream in place of stderr.
    """

    def __init__(self, title: str, after: float = 0.0, file: Any = None):
        self.title, self.after = title, after
        self.surface = _surface(file)
        self.done, self.total, self.unit, self.line = 0, None, "", ""
        self.partial, self.started = 0.0, time.monotonic()
        self.began = self.drawn = self.started
        self.place: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return self.surface is not None

    def begin(self, total: int | None, unit: str, line: str = "") -> None:
        self.done, self.total, self.unit, self.line = 0, total, unit, line
        self.partial, self.began = 0.0, time.monotonic()
        self._draw(EVERY)

    def advance(self, count: int = 1) -> None:
        self.done, self.partial = self.done + count, 0.0
        self._draw()

    def reach(self, units: float) -> None:
        self.partial = units
        self._draw()

    def pause(self) -> None:
        if self.surface is not None:
            with suppress(Exception):
                self.surface.clear()

    def close(self) -> None:
        if self.place is not None:
            _remember(self.place)
        if self.surface is not None:
            with suppress(Exception):
                self.surface.close()
            self.surface = None

    def seconds_left(self) -> float | None:
        """Returns how long the rest takes at the pace so far; None where that is not known."""
        worked = self.done + self.partial
        if self.total is None or worked <= 0:
            return None
        seconds = time.monotonic() - self.began
        return max(0.0, seconds / worked * (self.total - worked))

    def text(self) -> str:
        """Returns what stands beside the bar: the count, the time since the start, and the rest."""
        now = time.monotonic()
        of = "" if self.total is None else f" of {self.total:,}"
        left = self.seconds_left()
        rest = "" if left is None else f", {_clock(left)} left"
        return f"{self.done:,}{of} {self.unit}, {_clock(now - self.started)}{rest}"

    def _draw(self, ago: float = 0.0) -> None:
        """Draws, unless it has just been done or it is too early.

        Whatever comes of it ends what is shown, and not the work.
        """
        now = time.monotonic()
        if self.surface is None or now - self.started < self.after:
            return
        if now - self.drawn + ago < EVERY and self.done != self.total:
            return
        self.drawn = now
        try:
            if self.line:
                self.surface.keep(f"{self.title}: {self.line}")
                self.line = ""
            self.surface.draw(self)
        except Exception:  # a closed terminal, an encoding without letters
            self.surface = None


def progress(title: str, show: Show, file: Any = None) -> Progress:
    """Returns what a call reports to.

    Args:
        title: what is going on, the name of the function.
        show: True to show it at once, False never. By default it is shown where somebody looks: in
            a terminal or a notebook, once the work has lasted 3 seconds. It is not in processes
            behind the first of `torchrun`, in other threads than the main one, nor in loops: calls
            from one place in the code, each of which follows the last within 3 seconds. What a
            caller reports to already is returned as it is, and stays open.
        file: a text stream in place of stderr.

    Raises:
        ValueError: ``show`` is something else.

    >>> with progress("unit_fisher", False) as bar:
    ...     bar.begin(8, "passes")
    ...     bar.advance()
    """
    if isinstance(show, Progress):
        return _Lent(show)
    if show is not None and not isinstance(show, bool):
        raise ValueError(f"'progress' must be True, False or None, got {show!r}.")
    if show is False or (show is None and not _is_watched(file)):
        return Progress()
    if show:
        return Shown(title, file=file)
    place = _calling_place()
    if time.monotonic() - _ended.get(place, -AFTER) < AFTER:
        _remember(place)
        return Progress()
    shown = Shown(title, AFTER, file)
    shown.place = place
    return shown


class _Lent(Progress):
    """Somebody else's, who closes it."""

    def __init__(self, owner: Progress):
        self.owner = owner

    def __bool__(self) -> bool:
        return bool(self.owner)

    def begin(self, total: int | None, unit: str, line: str = "") -> None:
        self.owner.begin(total, unit, line)

    def advance(self, count: int = 1) -> None:
        self.owner.advance(count)

    def reach(self, units: float) -> None:
        self.owner.reach(units)

    def pause(self) -> None:
        self.owner.pause()


# -- where it is shown, and whether ----------------------------------------------------------------


def _is_watched(file: Any) -> bool:
    first = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    if not first or threading.current_thread() is not threading.main_thread():
        return False
    return (file is None and _in_notebook()) or _is_terminal(file or sys.stderr)


def _is_terminal(file: Any) -> bool:
    with suppress(Exception):  # there may be no stream, or a closed one
        return file.isatty() and os.environ.get("TERM") != "dumb"
    return False


def _in_notebook() -> bool:
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def _calling_place() -> tuple[int, int]:
    """The place in the code outside of this package that the call comes from."""
    frame = sys._getframe()
    own = f"{__package__}."
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(own):
        frame = frame.f_back
    return id(frame.f_code), frame.f_lasti


def _remember(place: tuple[int, int]) -> None:
    now = time.monotonic()
    for other in [key for key, ended in _ended.items() if now - ended > AFTER]:
        _ended.pop(other, None)
    _ended[place] = now


def _surface(file: Any) -> "_Terminal | _Lines | _Notebook":
    if file is None and _in_notebook():
        return _Notebook()
    file = file or sys.stderr
    return _Terminal(file) if _is_terminal(file) else _Lines(file)


def _clock(seconds: float) -> str:
    """A duration to read.

    >>> _clock(8.2), _clock(75.0), _clock(7300.0)
    ('8 s', '1:15', '2:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class _Terminal:
    """The line of a terminal that the cursor is on."""

    def __init__(self, file: Any):
        self.file, self.console, self.is_drawn = file, None, False

    def keep(self, line: str) -> None:
        """Writes a line that stays."""
        self._write(f"{ERASED}{line}\n")

    def draw(self, shown: Shown) -> None:
        self.is_drawn = True
        self._write(f"{ERASED}{self._rendered(shown)}\r")

    def clear(self) -> None:
        """Takes the line away."""
        if self.is_drawn:
            self.is_drawn = False
            self._write(ERASED)

    close = clear

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()

    def _rendered(self, shown: Shown) -> str:
        from rich.console import Console
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self.console is None:
            self.console = Console(file=self.file, force_terminal=True, highlight=False)
        # in the last column a terminal may break the line
        width = max(8, self.console.width - 1)
        row: list[Any] = [Text(shown.title)]
        if shown.total:
            worked = min(shown.done + shown.partial, shown.total)
            row.append(ProgressBar(shown.total, worked, width=min(30, max(4, width // 4))))
        row.append(Text(shown.text()))
        grid = Table.grid(padding=(0, 1))
        for _ in row:
            grid.add_column(no_wrap=True, overflow="crop")
        grid.add_row(*row)
        with self.console.capture() as capture:
            self.console.print(grid, width=width, no_wrap=True, overflow="crop", crop=True)
        return capture.get().split("\n")[0]


class _Lines:
    """A file or a pipe, where they were asked for: a line for every tenth of the work."""

    def __init__(self, file: Any):
        self.file, self.tenths = file, 0

    def keep(self, line: str) -> None:
        """Writes a line that stays."""
        if self.file is not None:
            self.file.write(f"{line}\n")
            self.file.flush()

    def draw(self, shown: Shown) -> None:
        tenths = shown.done * LINES // shown.total if shown.total else shown.done
        if tenths != self.tenths:
            self.tenths = tenths
            if tenths:
                self.keep(f"{shown.title}: {shown.text()}")

    def clear(self) -> None:
        """Does nothing: lines stay."""

    close = clear


class _Notebook:
    """An output of a cell, whose text changes in its place."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.kept = ""

    def keep(self, line: str) -> None:
        """Adds a line that stays."""
        self.kept += f"{line}\n"

    def draw(self, shown: Shown) -> None:
        self._show(f"{self.kept}{shown.title}: {shown.text()}")

    def clear(self) -> None:
        """Does nothing: nothing else is written into this output."""

    def close(self) -> None:
        """Leaves the lines that stay."""
        if self.handle is not None:
            self._show(self.kept.rstrip("\n"))

    def _show(self, text: str) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        data = {"text/plain": text}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)
