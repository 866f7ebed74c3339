"""How things are measured: methods in turns, memory in a fresh process, answers checked first.

A question is a module with ``prepare(method, device, small) -> Task`` and a list of methods.
`compare` starts one worker per method, checks its answer against the oracle, then lets the workers
run in turns, one at a time, so that a busy machine hurts all of them alike. The peak memory of a
method is that of one run in a fresh process, after a run of a small problem. `interleaved` is for
questions that need no processes.
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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

# In the environment where others use the machine: one thread, and CPU seconds.
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
# The relative error against float64 that float32 work may have; a method beyond it is not timed.
TOLERANCE = 1e-4
PRODUCT = 2048  # the size of the matrix product that times are compared with


@dataclass(frozen=True)
class Task:
    """``run()`` is timed; ``error(run())`` is its relative error against an answer in float64."""

    run: Callable[[], object]
    error: Callable[[Any], float]


class Unavailable(Exception):
    """A method that cannot run here, with the reason."""


# -- the worker's side -----------------------------------------------------------------------------


def work(question: str, method: str, device: str, small: bool) -> None:
    """Answers commands on stdin with one line of JSON each.

    Whatever the libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_float32_matmul_precision("highest")

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        prepare = importlib.import_module(f"benchmarks.{question}").prepare
        # Once through everything, so that kernels and caches of the libraries are no part of the
        # peak.
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
    """Waits for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Returns the seconds of one run; freeing its result is not part of it."""
    gc.collect()
    synchronize(device)
    start = clock(device)
    result = run()
    synchronize(device)
    taken = clock(device) - start
    del result
    return taken


def clock(device: str) -> float:
    """Returns wall-clock seconds; CPU seconds where the machine is shared."""
    return time.process_time() if SHARED in os.environ and device == "cpu" else time.perf_counter()


def extra_memory(run: Callable[[], object], device: str = "cpu") -> float | None:
    """Returns how many bytes the process grows by at the peak of one run, result included.

    None where the system does not report it.
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
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


# -- the side that asks ----------------------------------------------------------------------------


class Worker:
    """One method in a process of its own."""

    def __init__(self, question: str, method: str, device: str, small: bool = False):
        arguments = [question, method, device, str(int(small))]
        self.method, self.why, self.seconds = method, "", 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self._read()

    def ask(self, command: str) -> Any:
        """Returns the answer to one command; None when the worker has failed, see ``why``."""
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
        ended = {"ok": False, "why": "the process ended (out of memory?)"}
        answer = json.loads(line) if line else ended
        if answer.get("ok") is False:
            self.why = answer["why"]
        return answer

    def close(self) -> None:
        """Ends the process. Calling it again does nothing."""
        if self.process.stdin and not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()


def compare(
    question: str, methods: Sequence[str], device: str, repeats: int, tolerance: float = TOLERANCE
) -> list[dict]:
    """Returns one row per method: seconds (median, lowest), memory, error; or why there is none.

    ``products`` is their number of float32 products of 2048³ that were timed right before each run.
    Without repeats, the seconds are those of the one run whose memory was measured.
    """
    rows, workers, once = [], [], {}
    for method in methods:
        fresh = Worker(question, method, device, small=True)
        row: dict[str, Any] = {"method": method, "bytes": fresh.ask("memory")}
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
    products: dict[str, list[float]] = {method: [] for method in times}
    left, right = torch.randn(2, PRODUCT, PRODUCT, device=device).unbind()
    for _ in range(repeats):
        for worker in workers:
            if not worker.why:
                products[worker.method].append(seconds(lambda: left @ right, device))
                times[worker.method].append(worker.ask("time"))
    for worker, row in zip(workers, rows, strict=True):
        worker.close()
        if worker.method in times and not worker.why:
            row |= summary(times[worker.method])
            if repeats:
                row["products"] = median_ratio(times[worker.method], products[worker.method])
            memory = "" if row["bytes"] is None else f", +{row['bytes'] / 2**20:.0f} MiB"
            print(
                f"  {worker.method}: {row['seconds'] * 1e3:.1f} ms (fastest "
                f"{row['fastest'] * 1e3:.1f}){memory}, error {row['error']:.0e}",
                flush=True,
            )
    return rows


def interleaved(
    methods: Iterable[str], timed: Callable[[str], float], repeats: int
) -> dict[str, list[float]]:
    """Returns the seconds of every method, timed in turns; a first round warms up.

    Numbers of one place in two lists were measured right after each other: their ratios hold on a
    busy machine, too.
    """
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats + 1):
        for method, of_method in times.items():
            of_method.append(timed(method))
    return {method: of_method[1:] for method, of_method in times.items()}


def summary(times: Sequence[float]) -> dict[str, float]:
    """Returns what a row holds of the seconds of one method."""
    return {"seconds": median(times), "fastest": min(times), "repeats": len(times)}


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median of the ratios of seconds that were measured beside each other."""
    return median(a / b for a, b in zip(times, reference, strict=True))


# -- results ---------------------------------------------------------------------------------------


def devices() -> list[str]:
    """Returns the CPU, and the GPU where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def device_name(device: str) -> str:
    """Returns the model of the device; of a CPU also the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name, threads = names[0] if names else platform.processor(), torch.get_num_threads()
    return f"{name}, {'1 thread, CPU seconds' if SHARED in os.environ else f'{threads} threads'}"


def gemm_rate(device: str, size: int = PRODUCT, repeats: int = 5) -> float:
    """Returns the floating-point operations per second of a float32 matrix product."""
    a, b = torch.randn(2, size, size, device=device).unbind()
    return 2 * size**3 / median([seconds(lambda: a @ b, device) for _ in range(repeats + 1)][1:])


def version(package: str) -> str | None:
    """Returns the version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Returns the present commit, with a plus when the package differs from it."""

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../biasshift")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def write(question: str, device: str, title: str, rows: list[dict], **more: object) -> Path:
    """Writes one small JSON file per question and kind of device, and returns its path.

    It holds the rows, where and with what versions they were measured, and how to do it again.
    """
    result = {
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
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}_{device}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    # As the questions import it, so that its classes are the same.
    from benchmarks.harness import work

    work(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1")
