"""Engines that have other machines: Slurm by submitit, dask.distributed, and Ray.

They carry a job in bytes to a process that has this package, and bring back what it reported last.
"""

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from uuid import uuid4

from biasshift.training import remote_job
from biasshift.training.engine import GRACE_SECONDS, Engine, WorkerDied
from biasshift.training.process_pool import cores
from biasshift.training.remote_job import Outcome

POLL_SECONDS = 0.5  # between two looks at the jobs of Slurm
CONNECT_SECONDS = 30  # that a scheduler has to answer
SLURM_MINUTES = 60  # submitit's own default is 5
LARGEST_ARRAY = 1_000  # Slurm's default allows 1,001


class Cluster(Engine):
    """What the engines of other machines have in common.

    A subclass brings each `Outcome` to `_settle`.
    """

    def __init__(self):
        super().__init__()
        self.session = uuid4().hex  # of this engine's jobs, among those of others

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Returns the future of one job."""
        future: Future[None] = Future()
        self._send(remote_job.packed(work, arguments), future)
        return future

    def _send(self, job: bytes, future: "Future[None]") -> None:
        raise NotImplementedError

    def _settle(self, future: "Future[None]", outcome: Outcome) -> None:
        for report in outcome.reports:
            self.reports.put(report)
        if outcome.error is None:
            future.set_result(None)
        else:
            future.set_exception(outcome.error)

    def _fail(self, future: "Future[None]", error: BaseException) -> None:
        self._settle(future, Outcome([], error))

    def _wait(self, ended: Callable[[], bool]) -> None:
        """Waits until all jobs that had begun have ended, for as long as they may take."""
        end = time.monotonic() + GRACE_SECONDS
        while not ended() and time.monotonic() < end:
            time.sleep(0.1)


class Slurm(Cluster):
    """One Slurm job per job, in job arrays; or processes of this machine that stand for them.

    Args:
        workers: Jobs that run at a time, at most; None: as many as Slurm allows.
        folder: For what submitit writes; all machines must share it.
        options: ``cluster``, ``partition``, ``time`` (minutes), ``gpus``, ``cpus``.
    """

    def __init__(self, workers: int | None, folder: Path, options: dict[str, Any]):
        super().__init__()
        submitit = self._submitit = import_module("submitit")
        self.local = options.get("cluster") == "local"
        # Slurm counts by itself.
        self.most = (workers or cores()) if self.local else LARGEST_ARRAY * 1_000
        self._executor = submitit.AutoExecutor(folder, cluster="local" if self.local else "slurm")
        self._executor.update_parameters(
            name="biasshift",
            timeout_min=options.get("time", SLURM_MINUTES),
            cpus_per_task=options.get("cpus", 1),
            gpus_per_node=options.get("gpus"),
            slurm_partition=options.get("partition"),
            slurm_array_parallelism=workers or LARGEST_ARRAY,
        )
        self._waiting: list[tuple[bytes, Future[None]]] = []
        self._running: dict[Future[None], Any] = {}
        self._lock, self._ended = Lock(), Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _send(self, job: bytes, future: "Future[None]") -> None:
        with self._lock:
            self._waiting.append((job, future))

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._begin()
            self._collect()

    def _begin(self) -> None:
        with self._lock:
            free = min(self.most - len(self._running), LARGEST_ARRAY)
            batch, self._waiting = self._waiting[:free], self._waiting[free:]
        if not batch:
            return
        try:
            with self._executor.batch():
                jobs = [
                    self._executor.submit(remote_job.carry_out, self.session, job)
                    for job, _ in batch
                ]
        except Exception as error:  # sbatch refused, or is not there
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            refusal = f"Slurm did not take the jobs: {reason[0].rstrip('.')}."
            for _, future in batch:
                self._fail(future, RuntimeError(refusal))
            return
        self._running.update({future: job for (_, future), job in zip(batch, jobs, strict=True)})

    def _collect(self) -> None:
        for future, job in [*self._running.items()]:
            if not job.done():
                continue
            del self._running[future]
            try:
                if self.local and not job.paths.result_pickle.exists():  # else waited for
                    raise self._submitit.core.utils.UncompletedJobError
                outcome = job.result()
            except self._submitit.core.utils.FailedJobError as error:  # before it began
                outcome = Outcome([], RuntimeError(f"{_last_line(error)}."))
            except self._submitit.core.utils.UncompletedJobError:
                state = "its process ended" if self.local else f"state {job.state}"
                outcome = Outcome([], WorkerDied(f"Slurm job {job.job_id}, {state}"))
            self._settle(future, outcome)

    def interrupt(self) -> None:
        """Cancels all jobs. Slurm gives them the time that its KillWait says."""
        self._ended.set()
        self._thread.join()
        for job in self._running.values():
            with suppress(Exception):  # Slurm may have forgotten it
                job.cancel()
        self._wait(lambda: all(job.done() for job in self._running.values()))

    def close(self) -> None:
        """Ends the thread that looks at the jobs."""
        self._ended.set()
        self._thread.join()


class Dask(Cluster):
    """The workers of a dask scheduler, or of one of this machine.

    Args:
        workers: Processes of this machine; only without ``address``.
        address: Of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises:
        ValueError: No scheduler answers at the address, or its workers have several threads.
    """

    def __init__(self, workers: int | None, address: str | None):
        super().__init__()
        distributed: Any = import_module("distributed")
        self._died, self._cluster = distributed.KilledWorker, None
        if address is None:
            # Whether a job runs again is decided here, where it is told.
            with import_module("dask").config.set({"distributed.scheduler.allowed-failures": 0}):
                self._cluster = distributed.LocalCluster(
                    n_workers=workers or cores(),
                    threads_per_worker=1,
                    memory_limit=None,
                    dashboard_address=None,
                )
        try:
            self._client = distributed.Client(self._cluster or address, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(
                f"--launcher-options address={address} must be that of a dask scheduler which "
                f"runs: {_last_line(error)}."
            ) from None
        known = self._client.scheduler_info(-1)["workers"]  # -1: all of them
        threads = {worker["nthreads"] for worker in known.values()}
        if threads - {1}:
            self.close()
            raise ValueError(
                f"Workers of dask must have one thread each, got {max(threads)}. Start them with "
                "`dask worker --nthreads 1`."
            )
        self._executor = self._client.get_executor(pure=False, retries=0)

    def _send(self, job: bytes, future: "Future[None]") -> None:
        sent = self._executor.submit(remote_job.carry_out, self.session, job)
        sent.add_done_callback(lambda sent: self._take(sent, future))

    def _take(self, sent: "Future[Outcome]", future: "Future[None]") -> None:
        try:
            self._settle(future, sent.result())
        except self._died as error:
            self._fail(future, WorkerDied(f"dask's at {error.last_worker.address}"))
        except CancelledError:
            self._fail(future, RuntimeError("The scheduler of dask has forgotten a job, or ended."))
        except Exception as error:  # such as a package that the worker has not
            self._fail(future, error)

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt in all jobs that have begun."""
        self._executor.shutdown(wait=False)  # cancels the others
        with suppress(Exception):  # a scheduler that is gone has no jobs
            self._on_all(remote_job.interrupt)
            self._wait(lambda: not any(self._on_all(remote_job.runs)))

    def _on_all(self, function: Callable[[str], Any]) -> list[Any]:
        """What a function returns on each worker; of one that is just gone, nothing."""
        return [*self._client.run(function, self.session, on_error="ignore").values()]

    def close(self) -> None:
        """Ends the processes of this machine; those of an address stay."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


class Ray(Cluster):
    """The workers of a Ray cluster, or of one of this machine.

    Args:
        workers: Processes of this machine; only without ``address``.
        address: Of the cluster, such as ``ray://10.0.0.1:10001`` or ``auto``.

    Raises:
        ValueError: No cluster answers at the address.
    """

    def __init__(self, workers: int | None, address: str | None):
        super().__init__()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later releases will do
            ray = self._ray = import_module("ray")
            where: dict[str, Any] = {"num_cpus": workers or cores(), "include_dashboard": False}
            if address:
                where = {"address": address}
            try:
                _require_listener(address)
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"--launcher-options address={address} must be that of a Ray cluster which "
                    f"runs: {_last_line(error)}."
                ) from None
            self._carry_out = ray.remote(max_retries=0, num_cpus=1)(remote_job.carry_out)
        self._sent: dict[Future[None], Any] = {}

    def _send(self, job: bytes, future: "Future[None]") -> None:
        self._sent[future] = reference = self._carry_out.remote(self.session, job)
        reference.future().add_done_callback(lambda sent: self._take(sent, future))

    def _take(self, sent: "Future[Outcome]", future: "Future[None]") -> None:
        errors = self._ray.exceptions
        self._sent.pop(future, None)
        try:
            self._settle(future, sent.result())
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        ) as error:
            self._fail(future, WorkerDied(f"Ray's {type(error).__name__}"))
        except Exception as error:  # such as a package that the worker has not
            self._fail(future, error)

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt in all jobs that have begun, and drops the others."""
        for reference in [*self._sent.values()]:
            with suppress(Exception):
                self._ray.cancel(reference)
        self._wait(lambda: not self._sent)

    def close(self) -> None:
        """Ends the processes of this machine; those of an address stay."""
        self._ray.shutdown()


def _require_listener(address: str | None) -> None:
    """Raises OSError where nobody listens: Ray would try again for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
