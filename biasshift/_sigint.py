"""Ctrl-C and the signals that end a program: at once while it starts, once and in order later.

Importing PyTorch takes seconds. During that time the program ends at once when it is interrupted,
without a page of traceback. Later an interruption raises KeyboardInterrupt, so that runs are closed
and files that are half-written go away; further ones do not disturb that.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # the exit status, as shells have it
IMPATIENT_SECONDS = 10.0  # behind the first interruption, from which on another one ends at once
# What closes a terminal or ends a job of a cluster is an interruption, too.
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _quit(signum: int, frame: FrameType | None) -> None:
    """Ends the process: an exception would have to leave half-imported modules first."""
    os._exit(INTERRUPTED)


class Interruption:
    """Handles the signals of one program. The first raises KeyboardInterrupt.

    Those that come while a KeyboardInterrupt is on its way up are ignored: whoever presses Ctrl-C
    twice, or sends SIGTERM behind it, still gets runs that are closed.

    Attributes:
        status: The exit status that shells have for the last signal: 130 for Ctrl-C, 143 for
            SIGTERM.
        over: Whether there is nothing left to interrupt.
    """

    def __init__(self):
        self.status, self.over = INTERRUPTED, False
        self._first: float | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._first is not None and (self.over or _is_interrupted(sys.exception())):
            if time.monotonic() - self._first > IMPATIENT_SECONDS:
                os._exit(128 + signum)
            return
        # Also when an earlier one was lost, as in a destructor.
        self._first, self.status = time.monotonic(), 128 + signum
        raise KeyboardInterrupt


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an interruption is what the program handles, or was while it met with this error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


@contextlib.contextmanager
def interruptible(last: bool = False) -> Iterator[Interruption]:
    """Handles Ctrl-C, SIGTERM and SIGHUP in the block, and yields what handles them.

    Handlers that somebody else has set stay, as do signals that are ignored, such as SIGHUP below
    ``nohup``. In another thread than the main one nothing is handled.

    Args:
        last: Whether the process ends behind the block. Its signals then stay handled when it was
            interrupted: the interpreter takes half a second to end, in which another Ctrl-C would
            show a traceback.
    """
    interruption = Interruption()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, *_ENDING):
            handler = signal.getsignal(signum)
            if handler in (signal.SIG_DFL, signal.default_int_handler, _quit):
                before[signum] = handler
                signal.signal(signum, interruption)
    try:
        yield interruption
    finally:
        if not (last and interruption.over):
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _open_standard_streams() -> None:
    """Puts the empty device in place of standard streams that are closed.

    Otherwise the next file that is opened has their number, and gets what is meant for a terminal.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))


# What this process runs: a script, or the module behind -m. Other programs that import biasshift
# keep their handler; so do worker processes.
_program = "".join(sys.argv[:1])
if _program == "-m" and "-m" in sys.orig_argv:
    _program = "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1])
if Path(_program).stem == "biasshift":
    _open_standard_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)
