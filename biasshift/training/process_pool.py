"""Many runs at once: one process per core, one thread per process, because the networks of the
paper's MNIST part are small.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import torch

Job = tuple[Callable[..., None], tuple[Any, ...]]  # called with its arguments and ``report``

CLOSING = 30.0  # seconds that an interrupted worker has to close its run

# Of a worker process:
_reports: Any = None  # the queue of reports
_working = False
_stopped = False


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, report: Callable[[Any], None]) -> None:
    """Runs all jobs and calls ``report`` in this process with whatever one of them reports.

    Results do not depend on ``workers``: every job runs on one thread. The first job that fails
    ends the others, with its exception; so does an interruption from the keyboard. Jobs that have
    not begun by then never begin.

    Raises:
        ValueError: for less than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if workers == 1 or len(jobs) == 1:
        with _one_thread():
            for work, arguments in jobs:
                work(*arguments, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    reports = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (reports,))
    try:
        with _deaf_to_the_keyboard():
            waiting = {pool.submit(_work, *job) for job in jobs}
        while waiting:
            _relay(reports, report)
            waiting -= _finished(waiting)
        while _relay(reports, report):
            pass
    except BaseException:
        _interrupt(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _interrupt(pool: ProcessPoolExecutor) -> None:
    """Lets every worker close its run as interrupted; one that cannot, or not soon enough for a
    second Ctrl-C, is killed.
    """
    processes = list(pool._processes.values())
    for process in processes:
        process.terminate()  # heard by `_stop`
    pool.shutdown(wait=False, cancel_futures=True)
    running, end = {process.sentinel for process in processes}, time.monotonic() + CLOSING
    try:
        while running and time.monotonic() < end:
            running -= set(connection.wait(running, timeout=0.1))
    finally:
        for process in processes:
            process.kill()


def _finished(waiting: set[Future]) -> set[Future]:
    done = {future for future in waiting if future.done()}
    for future in done:
        future.result()  # raises what the job raised
    return done


def _relay(reports: Any, report: Callable[[Any], None]) -> bool:
    """One report, if there is one within a moment; says whether there was."""
    try:
        message = reports.get(timeout=0.1)
    except queue.Empty:
        return False
    report(message)
    return True


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    # reports that nobody reads any more must not keep the process from ending
    _reports.cancel_join_thread()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _work(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _working
    try:
        _working = True
        if not _stopped:  # the pool hands out a few jobs ahead: those must not begin
            work(*arguments, _report)
    except KeyboardInterrupt:
        raise RuntimeError(
            "interrupted"
        ) from None  # a worker that dies would break the pool, with a page of traceback
    finally:
        _working = False


def _report(message: Any) -> None:
    """Tells the parent. An interruption in here could leave the queue locked forever: it waits for
    the end.
    """
    global _working
    _working = False
    _reports.put(message)
    _working = True
    if _stopped:
        raise KeyboardInterrupt


def _stop(*_: object) -> None:
    """Interrupts the job, once: a second interruption would hit it while it closes its run."""
    global _stopped
    first, _stopped = not _stopped, True
    if _working and first:
        raise KeyboardInterrupt


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _deaf_to_the_keyboard() -> Iterator[None]:
    """Processes that are started in here never hear Ctrl-C, which a terminal sends to all: their
    parent tells them, once.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
