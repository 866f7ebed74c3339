"""A program of faults in a process of its own, as the tests run it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_alone(name: str, count: int) -> None:
    """Runs ``count`` faults where nothing checks types at every call: it shows what is lost.

    Type checks of the tests change the warning filters of the process, and are slow line by line.
    """
    command = [sys.executable, "-m", "tests.faults.one", name, str(count)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
