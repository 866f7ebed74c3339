"""Faults of one kind, in a process of its own: what one leaves there is not the next one's.

With the seed 0, as the tests run it: ``python -m tests.faults.one interrupts 105``.
"""

import importlib
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from tests.faults.tally import Tally


def tried(program: str, part: str | None, count: int, seed: int) -> list[Tally]:
    """What a program of this folder finds, or one part of it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    module = importlib.import_module(f"tests.faults.{program}")
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.tallies(count, seed, Path(work), part)


if __name__ == "__main__":
    found = tried(sys.argv[1], None, int(sys.argv[2]), 0)
    for tally in found:
        print(tally.row(), *tally.lost, sep="\n")
    raise SystemExit(any(tally.lost for tally in found))
