"""Run folders: what a run has recorded, written so that a kill loses nothing flushed, and read
without trusting it.
"""

from biasshift.runs.integrity import DamagedRunWarning, UncheckedRunWarning
from biasshift.runs.reader import read_run, read_runs, run_states
from biasshift.runs.writer import Run

__all__ = ["DamagedRunWarning", "Run", "UncheckedRunWarning", "read_run", "read_runs", "run_states"]
