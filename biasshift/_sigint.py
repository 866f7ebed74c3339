"""Ctrl-C while the program starts: importing PyTorch takes seconds, and an interruption in there
would print a page of traceback.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # the exit status, as shells have it


def quit_quietly(signum: int, frame: FrameType | None) -> None:
    """Ends the process at once: an exception would have to find its way out of half-imported
    modules.
    """
    os._exit(INTERRUPTED)


def started() -> None:
    """From here on an interruption is an exception again."""
    if signal.getsignal(signal.SIGINT) is quit_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What this process runs: a script, or the module behind -m. Whoever imports biasshift keeps his
# handler; so do worker processes.
_program = "".join(sys.argv[:1])
if _program == "-m" and "-m" in sys.orig_argv:
    _program = "".join(sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1])
if (
    Path(_program).stem == "biasshift"
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, quit_quietly)
