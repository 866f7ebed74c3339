"""Programs in processes of their own, as the tests run them: forked from one that has imported all,
so that a start takes hundredths of a second instead of ten.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds, for a machine that is busy with something else
IMPORTED = [
    "tests.faults.interrupts",
    "tests.faults.kills",
    "tests.faults.one",
    "biasshift.cli.train",
    "biasshift.experiments.demo",
    "sklearn.datasets",
    "torch._dynamo",
]


def server() -> Any:
    """The context of processes that are forked from the one that has imported all."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_alone(name: str, count: int, tmp_path: Path) -> None:
    """Runs ``count`` faults where nothing checks types at every call: it shows what is lost.

    Type checks of the tests change the warning filters of the process, and are slow line by line.
    """
    output = tmp_path / "output.txt"
    process = server().Process(target=_with_output, args=(output, _found, name, count))
    process.start()
    process.join(PATIENCE)
    said = output.read_text(encoding="utf-8") if output.exists() else ""
    assert process.exitcode == 0, said


def _found(name: str, count: int) -> None:
    from tests.faults.one import tried

    found = tried(name, None, count, 0)
    for tally in found:
        print(tally.row(), *tally.lost, sep="\n")
    raise SystemExit(any(tally.lost or not tally.tried for tally in found))


def _with_output(output: Path, program: Callable[..., None], *args: Any) -> None:
    """Runs a program of this process with what it says in a file."""
    with (
        open(output, "w", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            program(*args)
        except Exception:
            traceback.print_exc()
            raise
