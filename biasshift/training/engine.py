"""What carries jobs out: the processes of this machine, or an engine that has many machines.

All have the interface of `concurrent.futures`: a job is submitted, and its future is waited for.
"""

import pickle
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

GRACE_SECONDS = 30.0  # that an interrupted job has to close its run


class WorkerDied(RuntimeError):
    """The process that a job ran in has ended, or its machine is gone. The job may run again.

    The message is what it died of.
    """


class WorkerDiedWarning(RuntimeWarning):
    """A worker has died, and its job is run again."""


class Engine(ABC):
    """Runs jobs elsewhere, in a ``with`` block, behind which nothing of them is left.

    Attributes:
        reports: What the jobs report. All reports of a job are there before its future is done.
    """

    def __init__(self):
        self.reports: SimpleQueue[Any] = SimpleQueue()

    @abstractmethod
    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Returns the future of one job, which other processes must be able to import.

        It raises what the job raises, and `WorkerDied` where nobody knows how the job has ended.

        Args:
            work: Called with the arguments, and with a function to report with behind them.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Lets every job close its run as interrupted, for at most `GRACE_SECONDS`.

        Jobs that have not begun never begin.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the processes that the engine has started."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def portable(error: BaseException) -> BaseException:
    """Returns an exception for another process, with its traceback as a note.

    One that cannot be pickled is replaced by a RuntimeError of the same message.
    """
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
