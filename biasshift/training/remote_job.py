"""One job in a process that an engine has started: alone, on one thread, and interrupted once."""

import ctypes
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from biasshift.training.engine import WorkerDied, portable
from biasshift.training.process_pool import one_thread

# What ends a job of Slurm, or of Ray, or says that its time is nearly over.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name)
]
# Two jobs at once would draw from one random state: workers with several threads wait here.
_alone = threading.Lock()
_current: tuple[str, int] | None = None  # session and thread of the job that runs


class Outcome(NamedTuple):
    """How a job has ended, and the first and the last report of each of its runs."""

    reports: list[Any]
    error: BaseException | None


def packed(work: Callable[..., None], arguments: tuple[Any, ...]) -> bytes:
    """Returns a job in bytes, with where Python looks for modules here, and the command."""
    return pickle.dumps((sys.path, sys.argv, os.getcwd(), pickle.dumps((work, arguments))))


def carry_out(session: str, job: bytes) -> Outcome:
    """Runs one job in this process, behind all that it may run already.

    Args:
        session: Whose job it is, see `interrupt`.
        job: Of `packed`.
    """
    global _current
    path, command, folder, inner = pickle.loads(job)
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}

    def report(progress: Any) -> None:
        first.setdefault(progress.run, progress)
        last[progress.run] = progress

    with _alone, _place(path, command, folder), one_thread():
        try:
            with _signals_interrupt_once():
                _current = session, threading.get_ident()
                work, arguments = pickle.loads(inner)
                work(*arguments, report)
                _current = None
            error = None
        except KeyboardInterrupt:
            error = WorkerDied("an interruption where it ran")
        except Exception as caught:
            error = portable(caught)
        finally:
            _current = None
    return Outcome([*first.values(), *last.values()], error)


def interrupt(session: str) -> None:
    """Raises KeyboardInterrupt in the job of a session, if one runs in this process."""
    current = _current
    if current is not None and current[0] == session:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(current[1]), ctypes.py_object(KeyboardInterrupt)
        )


def runs(session: str) -> bool:
    """Returns whether a job of the session runs in this process."""
    return _current is not None and _current[0] == session


@contextmanager
def _place(path: list[str], command: list[str], folder: str) -> Iterator[None]:
    """Modules are found as in the process that sent the job, and runs record its command."""
    before = sys.argv
    sys.path.extend(entry for entry in path if entry not in sys.path)
    if "" in path and folder not in sys.path:
        sys.path.append(folder)
    sys.argv = command
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _signals_interrupt_once() -> Iterator[None]:
    """The first signal raises KeyboardInterrupt; more would hit the run while it is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(signum: int, frame: object) -> None:
        nonlocal interrupted
        first, interrupted = not interrupted, True
        if first:
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, handle) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
