"""How things are measured: one process per method, repeats interleaved, memory in a fresh process,
answers checked first.

A question is a module with ``prepare(method, device, small) -> Task`` and a list of methods.
`compare` starts one worker per method, checks its answer against the oracle, then lets the workers
run in turns, one at a time, so that a busy machine hurts all of them alike. The peak memory of a
method is that of one run in a fresh process, after a run of a small problem.
"""

import ctypes
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

# in the environment: others use this machine, so one thread, and CPU seconds
SHARED = "BIASSHIFT_BENCHMARKS_SHARED"
RESULTS = Path(__file__).parent / "results"
PACKAGES = [
    "torch",
    "biasshift",
    "asdfghjkl",
    "backpack-for-pytorch",
    "opacus",
    "nngeometry",
    "curvlinops-for-pytorch",
    "delve",
]
# relative error against float64 that float32 work may have; a method beyond it is not timed
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Task:
    """``run()`` is what is timed; ``error(run())`` is its relative error against an answer in
    float64.
    """

    run: Callable[[], object]
    error: Callable[[Any], float]


class Unavailable(Exception):
    """A method that cannot run here, with the reason."""


# -- the worker's side -----------------------------------------------------------------------------


def work(question: str, method: str, device: str, small: bool) -> None:
    """Answers commands on stdin with one line of JSON each; whatever the libraries print goes to
    stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_float32_matmul_precision("highest")

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        prepare = importlib.import_module(f"benchmarks.{question}").prepare
        # once through everything, so that kernels and caches of the libraries are no part of the
        # peak
        if small:
            prepare(method, device, True).run()
        task = prepare(method, device, False)
        answer(ok=True)
        for line in sys.stdin:
            command = line.strip()
            if command == "error":
                answer(value=task.error(task.run()))
            elif command == "time":
                answer(value=seconds(task.run, device))
            elif command == "memory":
                start = clock(device)
                answer(value=extra_memory(task.run, device), seconds=clock(device) - start)
    except (Unavailable, ImportError) as reason:
        answer(ok=False, why=str(reason))
    except Exception as error:
        traceback.print_exc()
        answer(ok=False, why=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one run; freeing its result is not part of it."""
    gc.collect()
    synchronize(device)
    start = clock(device)
    result = run()
    synchronize(device)
    taken = clock(device) - start
    del result
    return taken


def clock(device: str) -> float:
    """Wall-clock seconds; CPU seconds where the machine is shared."""
    return time.process_time() if SHARED in os.environ and device == "cpu" else time.perf_counter()


def extra_memory(run: Callable[[], object], device: str = "cpu") -> float | None:
    """How many bytes the process grows by during one run at its peak, result included. None where
    the system does not tell.
    """
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(key: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key + ":")
    )
    return int(line.split()[1]) * 1024


# -- the other side --------------------------------------------------------------------------------


class Worker:
    """One method in a process of its own."""

    def __init__(self, question: str, method: str, device: str, small: bool = False):
        command = [
            sys.executable,
            "-m",
            "benchmarks.harness",
            question,
            method,
            device,
            str(int(small)),
        ]
        self.method, self.why, self.seconds = method, "", 0.0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self._read()

    def ask(self, command: str) -> Any:
        """The answer to one command; None when the worker has failed, and then ``why`` says why."""
        if self.why:
            return None
        stdin: IO[str] = self.process.stdin  # pyright: ignore[reportAssignmentType]
        print(command, file=stdin, flush=True)
        answer = self._read()
        self.seconds = answer.get("seconds", 0.0)
        return answer.get("value")

    def _read(self) -> dict:
        stdout: IO[str] = self.process.stdout  # pyright: ignore[reportAssignmentType]
        line = stdout.readline()
        answer = (
            json.loads(line) if line else {"ok": False, "why": "the process ended (out of memory?)"}
        )
        if answer.get("ok") is False:
            self.why = answer["why"]
        return answer

    def close(self) -> None:
        if self.process.stdin and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        self.process.wait()


def compare(
    question: str, methods: Sequence[str], device: str, repeats: int, tolerance: float = TOLERANCE
) -> list[dict]:
    """One row per method: seconds (median, lowest), memory, error; or why there is none. Without
    repeats, the seconds are those of the one run whose memory was measured.
    """
    rows, workers, once = [], [], {}
    for method in methods:
        row: dict[str, Any] = {"method": method}
        fresh = Worker(question, method, device, small=True)
        row["bytes"] = fresh.ask("memory")
        once[method] = fresh.seconds
        fresh.close()
        worker = Worker(question, method, device)
        row["error"] = worker.ask("error")
        if row["error"] is not None and not row["error"] <= tolerance:
            worker.why = f"wrong: relative error {row['error']:.1e}"
        if worker.why:
            row["skipped"] = worker.why
            print(f"  {method}: left out ({worker.why})", flush=True)
        rows.append(row)
        workers.append(worker)
    times: dict[str, list[float]] = {
        w.method: [] if repeats else [once[w.method]] for w in workers if not w.why
    }
    for _ in range(repeats):
        for worker in workers:
            if not worker.why:
                times[worker.method].append(worker.ask("time"))
    for worker, row in zip(workers, rows, strict=True):
        worker.close()
        if worker.method in times and not worker.why:
            row |= {
                "seconds": median(times[worker.method]),
                "fastest": min(times[worker.method]),
                "repeats": max(1, repeats),
            }
            print(f"  {worker.method}: {show(row)}", flush=True)
    return rows


def show(row: dict) -> str:
    memory = "" if row.get("bytes") is None else f", +{row['bytes'] / 2**20:.0f} MiB"
    return f"{row['seconds'] * 1e3:.1f} ms (fastest {row['fastest'] * 1e3:.1f}){memory}, error {row['error']:.0e}"


# -- results ---------------------------------------------------------------------------------------


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = (
        "1 thread, CPU seconds" if SHARED in os.environ else f"{torch.get_num_threads()} threads"
    )
    return f"{names[0] if names else platform.processor()}, {threads}"


def gemm_rate(device: str, size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a float32 matrix product: what this device can do."""
    a, b = torch.randn(2, size, size, device=device).unbind()
    return 2 * size**3 / median([seconds(lambda: a @ b, device) for _ in range(repeats + 1)][1:])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The present commit, with a plus when the tree differs from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "../biasshift") else ""
    )


def write(question: str, device: str, title: str, rows: list[dict], **more: object) -> Path:
    """One small JSON file per question and kind of device."""
    header = {
        "question": question,
        "title": title,
        "device": device_name(device),
        "gemm_gflops": round(gemm_rate(device) / 1e9, 1),
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python -m benchmarks {'--shared ' if SHARED in os.environ else ''}{question}",
        "date": date.today().isoformat(),
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}_{device}.json"
    path.write_text(
        json.dumps({**header, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return path


if __name__ == "__main__":
    from benchmarks.harness import (
        work,
    )  # as the questions import it, so that its classes are the same

    work(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1")
