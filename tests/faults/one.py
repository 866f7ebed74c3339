"""Faults of one kind, in a process of its own: what one leaves there is not the next one's."""

import importlib
import signal
import tempfile
import warnings
from pathlib import Path

import torch

from tests.faults.tally import Tally


def tried(program: str, part: str, count: int, seed: int) -> list[Tally]:
    """What a program of this folder finds."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    module = importlib.import_module(f"tests.faults.{program}")
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.tallies(count, seed, Path(work), part)
