"""Many runs at once: one process per core, and one thread per process.

The networks of the paper's MNIST part are too small for more than one thread.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple

import torch

from biasshift.training.engine import (
    GRACE_SECONDS,
    Engine,
    WorkerDied,
    WorkerDiedWarning,
    portable,
)

Job = tuple[Callable[..., None], tuple[Any, ...]]  # called with its arguments and ``report``

ATTEMPTS = 3  # that a job has whose workers die

# Of a worker process:
IDLE, WORKING, REPORTING = range(3)
TERMINATED = 128 + signal.SIGTERM  # its exit status behind SIGTERM, as shells have it
_pipe: Any = None  # to the parent
_state = IDLE
_stopped = False


def cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    report: Callable[[Any], None],
    launch: Callable[[], Engine] | None = None,
) -> None:
    """Runs all jobs, in this process or in others, and passes on what they report.

    Results do not depend on ``workers`` or ``launch``: every job runs on one thread. The first job
    that fails ends the others, with its exception; so does an interruption from the keyboard. Jobs
    that have not begun by then never begin. A job whose worker dies is run again, twice at most.

    Args:
        jobs: Functions that other processes can import, and their arguments. Each is called with
            a function to report with, behind these.
        workers: Processes at most; 1 is this process.
        report: Called in this process with whatever a job reports, in the job's order.
        launch: Starts the engine that runs the jobs; by default processes of this machine.

    Raises:
        ValueError: ``workers`` is below 1.
        RuntimeError: The workers of one job died three times.
    """
    if workers < 1:
        raise ValueError(f"'workers' must be at least 1, got {workers}.")
    if launch is None and (workers == 1 or len(jobs) == 1):
        with one_thread():
            for work, arguments in jobs:
                work(*arguments, report)
        return
    with launch() if launch else ProcessPool(min(workers, len(jobs))) as engine:
        try:
            _run_all(engine, jobs, report)
        except BaseException:
            engine.interrupt()
            raise


def _run_all(engine: Engine, jobs: Sequence[Job], report: Callable[[Any], None]) -> None:
    waiting = {engine.submit(work, *arguments): (work, arguments, 1) for work, arguments in jobs}
    while waiting:
        _relay(engine, report, seconds=0.1)
        for future in [future for future in waiting if future.done()]:
            work, arguments, attempt = waiting.pop(future)
            try:
                future.result()  # raises what the job raised
            except WorkerDied as death:
                if attempt == ATTEMPTS:
                    raise RuntimeError(
                        f"The workers of one job died {ATTEMPTS} times, at last by {death}. Look "
                        "at their memory: fewer at a time may fit."
                    ) from death
                warnings.warn(
                    f"A job runs again, because its worker died ({death}). "
                    f"This is attempt {attempt + 1} of {ATTEMPTS}.",
                    WorkerDiedWarning,
                    stacklevel=3,
                )
                waiting[engine.submit(work, *arguments)] = work, arguments, attempt + 1
    _relay(engine, report)


def _relay(engine: Engine, report: Callable[[Any], None], seconds: float = 0.0) -> None:
    """Passes on all reports that are there; waits for the first one that long."""
    try:
        report(engine.reports.get(timeout=seconds) if seconds else engine.reports.get_nowait())
    except queue.Empty:
        return
    for _ in range(engine.reports.qsize()):  # not of those that come meanwhile
        report(engine.reports.get_nowait())


# -- processes of this machine ---------------------------------------------------------------------


class Worker(NamedTuple):
    """A process, and the pipe on which it gets jobs and answers.

    A pipe of its own: a worker that is killed in the middle of a message harms no other.
    """

    process: Any
    pipe: Any


class ProcessPool(Engine):
    """So many processes of this machine, each of which does one job after the other.

    A thread here waits for each. A process that dies is replaced when its thread gets the next job.

    Args:
        workers: The number of processes, at least 1.
    """

    def __init__(self, workers: int):
        super().__init__()
        self._context = multiprocessing.get_context("spawn")  # a forked torch may hang
        # Now, because its start would lift the block of keyboard interrupts from a thread.
        if hasattr(resource_tracker, "ensure_running"):
            resource_tracker.ensure_running()
        self._threads = ThreadPoolExecutor(workers, "worker", _block_keyboard_interrupts)
        self._here = threading.local()  # the worker of each thread
        self._workers: list[Worker] = []
        self._lock, self._ended = threading.Lock(), False

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Returns the future of one job."""
        return self._threads.submit(self._carry_out, (work, arguments))

    def _carry_out(self, job: Job) -> None:
        worker = getattr(self._here, "worker", None)
        if worker is None or not worker.process.is_alive():
            worker = self._here.worker = self._start()
        try:
            worker.pipe.send_bytes(pickle.dumps(job))
            while True:
                connection.wait([worker.pipe, worker.process.sentinel])
                # A worker that has ended may have answered before.
                if not worker.pipe.poll():
                    raise EOFError
                kind, value = worker.pipe.recv()
                if kind == "error":
                    raise value
                if kind == "done":
                    return
                self.reports.put(value)
        except (EOFError, ConnectionError):
            self._here.worker = None
            raise WorkerDied(self._end_of(worker)) from None

    def _start(self) -> Worker:
        with self._lock:
            if self._ended:
                raise CancelledError
            pipe, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()  # else its end would not be noticed
            worker = Worker(process, pipe)
            self._workers.append(worker)
        return worker

    def _end_of(self, worker: Worker) -> str:
        with self._lock:
            worker.process.join()
        status = worker.process.exitcode
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def interrupt(self) -> None:
        """Lets every worker close its run as interrupted, and kills those that do not.

        A second Ctrl-C kills them at once.
        """
        processes = self._end()
        for process in processes:
            process.terminate()  # `_stop` handles it
        running, end = {process.sentinel for process in processes}, time.monotonic() + GRACE_SECONDS
        try:
            while running and time.monotonic() < end:
                running -= set(connection.wait(running, timeout=0.1))
        finally:
            for process in processes:
                process.kill()

    def _end(self) -> list[Any]:
        """Has no further job begin, and returns the processes that may still run."""
        with self._lock:
            self._ended = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        return [worker.process for worker in self._workers]

    def close(self) -> None:
        """Waits for the jobs that run, and ends the processes."""
        self._end()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.pipe.close()  # an idle worker ends then
            worker.process.join()


# -- one of them -----------------------------------------------------------------------------------


def _serve(pipe: Any) -> None:
    """Does the jobs that come through a pipe, until it is closed."""
    global _pipe, _state
    _pipe = pipe
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        while not _stopped:
            answer = _answer(pipe.recv_bytes())
            _state = REPORTING
            pipe.send(answer)
            _state = IDLE
    except (EOFError, ConnectionError):  # nobody asks, or listens, any more
        return
    except KeyboardInterrupt:
        pass
    sys.exit(TERMINATED)


def _answer(job: bytes) -> tuple[str, Any]:
    global _state
    try:
        _state = WORKING
        if _stopped:
            raise KeyboardInterrupt
        work, arguments = pickle.loads(job)
        work(*arguments, _report)
        _state = REPORTING
        return "done", None
    except KeyboardInterrupt:
        _state = REPORTING
        sys.exit(TERMINATED)  # whether the job is run again is the parent's to say
    except Exception as error:
        _state = REPORTING
        return "error", portable(error)


def _report(message: Any) -> None:
    """Sends to the parent. An interruption waits for the end: half a message cannot be read."""
    global _state
    _state = REPORTING
    _pipe.send(("report", message))
    _state = WORKING
    if _stopped:
        raise KeyboardInterrupt


def _stop(*_: object) -> None:
    """Interrupts the job, once: a second interruption would hit it while it closes its run."""
    global _stopped
    first, _stopped = not _stopped, True
    if _state == IDLE:
        sys.exit(TERMINATED)
    if _state == WORKING and first:
        raise KeyboardInterrupt


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would work on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _block_keyboard_interrupts() -> None:
    """Processes that this thread starts ignore Ctrl-C, which a terminal sends to all of them.

    Their parent interrupts them, once.
    """
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def one_thread() -> Iterator[None]:
    """Has PyTorch work on one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
