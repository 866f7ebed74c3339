"""Run folders: what a run has recorded, written so that a kill loses nothing flushed, and read
without trusting it.

Public names load when they are first used (PEP 562): who reads runs needs no PyTorch.
"""

from typing import TYPE_CHECKING

from biasshift.lazy_names import lazy_names

if TYPE_CHECKING:
    from biasshift.runs.integrity import (
        DamagedRunWarning as DamagedRunWarning,
        UncheckedRunWarning as UncheckedRunWarning,
    )
    from biasshift.runs.reader import (
        read_run as read_run,
        read_runs as read_runs,
        run_states as run_states,
    )
    from biasshift.runs.writer import Run as Run

__all__ = ["DamagedRunWarning", "Run", "UncheckedRunWarning", "read_run", "read_runs", "run_states"]

_MODULES = {
    "DamagedRunWarning": "runs.integrity",
    "Run": "runs.writer",
    "UncheckedRunWarning": "runs.integrity",
    "read_run": "runs.reader",
    "read_runs": "runs.reader",
    "run_states": "runs.reader",
}

__getattr__, __dir__ = lazy_names("biasshift.runs", _MODULES)
