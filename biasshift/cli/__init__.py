"""The command line: ``biasshift demo | train | sweep | figure | claims | runs | report``.

`parser` reads the words, and the other files carry out what they ask for. Here nothing is imported
that a command may not need: help, errors and lists of runs come without PyTorch.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from biasshift._sigint import INTERRUPTED, interruptible
from biasshift.cli.errors import error_message
from biasshift.cli.streams import enduring_streams
from biasshift.escapes import visible

if TYPE_CHECKING:
    from rich.console import Console

UNREAD, USAGE_ERROR = 1, 2  # exit statuses
TRAINING = (
    "interrupted. Finished runs are complete; the others are readable up to their last flush. The "
    "same command with --resume continues them."
)
LOOKING = "interrupted. Files are whole: those that were there, or new ones in their place."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program ``biasshift``.

    The exit status is 0 after success, 130 after Ctrl-C, and 143 after SIGTERM. It is 2 for bad
    input, of which one sentence on stderr gives the cause and the remedy. It is 1 where nobody
    reads the output, or it has no room; runs are trained to their end all the same.

    Args:
        arguments: The words behind ``biasshift``; by default those of this process.

    Raises:
        SystemExit: The status is not 0, or the help was asked for.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with enduring_streams() as (output, errors):
        status = _run(words, last=arguments is None)
        output.flush()
        # Nobody wants to hear of it who has closed the output, as `| head -1` does.
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            reason = output.error.strerror
            print(f"biasshift: The output could not be written ({reason}).", file=errors)
    if status := status or (output.error is not None and UNREAD):
        sys.exit(status)


def _run(words: Sequence[str], last: bool) -> int:
    """Carries out a command line, says in a sentence why it cannot, and returns the status.

    Args:
        last: Whether the process ends behind it.
    """
    options: Any = None
    status, usual = INTERRUPTED, warnings.formatwarning
    warnings.formatwarning = _warnings_in_a_line()
    try:
        if words == ["--version"]:
            from importlib.metadata import version

            print(f"biasshift {version('biasshift')}")
            return 0
        from biasshift.cli.parser import parse

        options = parse(words)
        run_command = _command(options)
        with interruptible(last) as interruption:
            try:
                run_command(_console())
            except KeyboardInterrupt:
                status, interruption.over = interruption.status, True
                raise
    except SystemExit as end:  # of the parser: the help, or a wrong option
        return end.code if isinstance(end.code, int) else USAGE_ERROR
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"biasshift: {error_message(error)}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        trains = type(options).__module__ != "biasshift.cli.commands"
        print(f"biasshift: {TRAINING if trains else LOOKING}", file=sys.stderr)
        return status
    finally:
        warnings.formatwarning = usual
    return 0


def _warnings_in_a_line() -> Callable[..., str]:
    """What formats a warning: once each, without the place in the program that it comes from."""
    said: set[str] = set()

    def format_warning(message: Warning | str, *_: object, **__: object) -> str:
        text = f"biasshift: {visible(str(message))}\n"
        return "" if text in said or said.add(text) else text

    return format_warning


def _console() -> "Console":
    from biasshift.cli.console import Terminal

    # Without markup: a path may hold brackets and colons.
    console = Terminal(file=sys.stdout, highlight=False, markup=False, emoji=False)
    # Under torchrun; `biasshift.distributed` would import PyTorch for every command.
    rank, processes = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    console.quiet = processes > 1 and rank > 0
    return console


def _command(options: Any) -> Callable[["Console"], None]:
    """What carries out a command. All that it needs is imported in here: help and wrong options
    come without PyTorch, pandas, Matplotlib and the figures.
    """
    from biasshift.cli.commands import Claims, Figure, Report, Runs

    if isinstance(options, Claims):
        if not options.runs:
            raise ValueError("Claims need runs: `biasshift claims FOLDER`.")
        from biasshift.cli.claims import judge

        return lambda console: judge(console, options)
    if isinstance(options, Runs):
        from biasshift.cli.run_list import list_runs

        return lambda console: list_runs(console, options.runs, options.json)
    if isinstance(options, Report):
        if not options.runs:
            raise ValueError("A report needs runs: `biasshift report FOLDER`.")
        return lambda console: _report(console, options)
    from biasshift.cli.train import run_experiment

    if isinstance(options, Figure):
        from biasshift.cli.figure import draw_figures
        from biasshift.cli.parser import parse

        return lambda console: draw_figures(console, options, parse, run_experiment)
    return lambda console: run_experiment(console, options)


def _report(console: "Console", options: Any) -> None:
    from biasshift.cli.console import watched
    from biasshift.report import report

    with watched(console, "report") as bar:
        page = report(options.runs, options.out, progress=bar)
    console.print(f"Report: {visible(str(page))}", soft_wrap=True)
