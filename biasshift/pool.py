"""Many runs at once: one process per core, one thread per process, because the networks of the paper's MNIST part are small."""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Job = tuple[Callable[..., None], tuple[Any, ...]]  # called with its arguments and ``on_epoch``

_epochs: Any = None  # the queue of a worker process


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, on_epoch: Callable[[], None]) -> None:
    """Runs all jobs and calls ``on_epoch`` in this process whenever one of them has finished an epoch.

    Results do not depend on ``workers``: every job runs on one thread. The first job that fails ends the others, with its
    exception; so does an interruption from the keyboard.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    if workers == 1 or len(jobs) == 1:
        with _one_thread():
            for work, arguments in jobs:
                work(*arguments, on_epoch)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    finished_epochs = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (finished_epochs,))
    try:
        waiting = {pool.submit(_work, *job) for job in jobs}
        while waiting:
            _relay(finished_epochs, on_epoch)
            waiting -= _finished(waiting)
        _relay(finished_epochs, on_epoch)
    except BaseException:
        for process in list(pool._processes.values()):
            os.kill(process.pid or 0, signal.SIGINT)  # each worker closes its run as interrupted
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: set[Future]) -> set[Future]:
    done = {future for future in waiting if future.done()}
    for future in done:
        future.result()  # raises what the job raised
    return done


def _relay(finished_epochs: Any, on_epoch: Callable[[], None]) -> None:
    try:
        while True:
            finished_epochs.get(timeout=0.1)
            on_epoch()
    except queue.Empty:
        return


def _start_worker(finished_epochs: Any) -> None:
    global _epochs
    _epochs = finished_epochs
    torch.set_num_threads(1)


def _work(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments, lambda: _epochs.put(None))
    except KeyboardInterrupt:
        raise RuntimeError("interrupted") from None  # a worker that dies would break the pool, with a page of traceback


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
