"""Ctrl-C while the program starts, when it would print a page of traceback.

Importing PyTorch takes seconds. During that time the program ends at once when it is interrupted;
`started` gives Ctrl-C its usual meaning back.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # the exit status, as shells have it


def _quit(signum: int, frame: FrameType | None) -> None:
    """Ends the process: an exception would have to leave half-imported modules first."""
    os._exit(INTERRUPTED)


def started() -> None:
    """Makes an interruption raise KeyboardInterrupt again, once all imports are done."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What this process runs: a script, or the module behind -m. Other programs that import biasshift
# keep their handler; so do worker processes.
_program = "".join(sys.argv[:1])
if _program == "-m" and "-m" in sys.orig_argv:
    _program = "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1])
if (
    Path(_program).stem == "biasshift"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _quit)
