"""Many runs at once: one process per core, and one thread per process.

The networks of the paper's MNIST part are too small for more than one thread.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import torch

Job = tuple[Callable[..., None], tuple[Any, ...]]  # called with its arguments and ``report``

GRACE_SECONDS = 30.0  # that an interrupted worker has to close its run

# Of a worker process:
_reports: Any = None  # the queue of reports
_working = False
_stopped = False


def cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, report: Callable[[Any], None]) -> None:
    """Runs all jobs, in this process or in several, and passes on what they report.

    Results do not depend on ``workers``: every job runs on one thread. The first job that fails
    ends the others, with its exception; so does an interruption from the keyboard. Jobs that have
    not begun by then never begin.

    Args:
        jobs: Functions that other processes can import, and their arguments. Each is called with
            a function to report with, behind these.
        workers: Processes at most; 1 is this process.
        report: Called in this process with whatever a job reports, in the job's order.

    Raises:
        ValueError: ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"'workers' must be at least 1, got {workers}.")
    if workers == 1 or len(jobs) == 1:
        with one_thread():
            for work, arguments in jobs:
                work(*arguments, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    reports = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (reports,))
    try:
        with _keyboard_interrupts_blocked():
            waiting = {pool.submit(_work, *job) for job in jobs}
        while waiting:
            _relay(reports, report)
            done = {future for future in waiting if future.done()}
            for future in done:
                future.result()  # raises what the job raised
            waiting -= done
        while _relay(reports, report):
            pass
    except BaseException:
        _interrupt(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _interrupt(pool: ProcessPoolExecutor) -> None:
    """Lets every worker close its run as interrupted, and kills those that do not.

    A second Ctrl-C kills them at once.
    """
    processes = list(pool._processes.values())
    for process in processes:
        process.terminate()  # `_stop` handles it
    pool.shutdown(wait=False, cancel_futures=True)
    running, end = {process.sentinel for process in processes}, time.monotonic() + GRACE_SECONDS
    try:
        while running and time.monotonic() < end:
            running -= set(connection.wait(running, timeout=0.1))
    finally:
        for process in processes:
            process.kill()


def _relay(reports: Any, report: Callable[[Any], None]) -> bool:
    """Passes on one report, if there is one within a moment; returns whether there was."""
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
        # A worker that dies would break the pool, with a page of traceback.
        raise RuntimeError("Interrupted.") from None
    finally:
        _working = False


def _report(message: Any) -> None:
    """Sends to the parent. An interruption waits for the end: it could lock the queue forever."""
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
def _keyboard_interrupts_blocked() -> Iterator[None]:
    """Processes that start in here ignore Ctrl-C, which a terminal sends to all of them.

    Their parent interrupts them, once.
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
def one_thread() -> Iterator[None]:
    """Has PyTorch work on one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
