"""The command line: ``biasshift demo | train | sweep | figure | claims | runs | report``.

Options are typed dataclasses, from which tyro makes the parser and the help. Those of ``demo``,
``train`` and ``sweep`` are the experiments themselves; the others are in `biasshift.cli.commands`.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import tyro
from rich.console import Console

from biasshift._sigint import INTERRUPTED, interruptible
from biasshift.cli.commands import Claims, Figure, Report, Runs
from biasshift.cli.console import Terminal, error_message
from biasshift.cli.streams import enduring_streams
from biasshift.distributed import under_torchrun
from biasshift.escapes import visible
from biasshift.experiments.autoencoder import Autoencoder
from biasshift.experiments.cifar11 import Cifar11
from biasshift.experiments.cifar18 import Cifar18
from biasshift.experiments.demo import Demo
from biasshift.experiments.experiment import REPLACE_OR_RESUME
from biasshift.experiments.imagenet import Imagenet
from biasshift.experiments.mnist import Mnist
from biasshift.experiments.sweep import Sweep

EXPERIMENTS = {
    "mnist": Mnist,
    "autoencoder": Autoencoder,
    "cifar11": Cifar11,
    "cifar18": Cifar18,
    "imagenet": Imagenet,
}
UNREAD, USAGE_ERROR = 1, 2  # exit statuses
TRAINING = (
    "interrupted. Finished runs are complete; the others are readable up to their last flush. The "
    "same command with --resume continues them."
)
LOOKING = "interrupted. Files are whole: those that were there, or new ones in their place."
COMMANDS = {"figure": Figure, "claims": Claims, "runs": Runs, "report": Report}


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
            print(f"biasshift {metadata.version('biasshift')}")
            return 0
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
        others = tuple(COMMANDS.values())
        print(f"biasshift: {LOOKING if isinstance(options, others) else TRAINING}", file=sys.stderr)
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


def _console() -> Terminal:
    # Without markup: a path may hold brackets and colons.
    console = Terminal(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.quiet = under_torchrun() and int(os.environ.get("RANK", "0")) > 0
    return console


def parse(words: Sequence[str]) -> Any:
    """Returns the options of a command line: an experiment, or a dataclass of `cli.commands`.

    Raises:
        ValueError: Both --replace and --resume are given.
        SystemExit: A word is wrong, with status 2, or the help was asked for.

    >>> parse(["runs", "runs/mnist"])
    Runs(runs=(PosixPath('runs/mnist'),))
    """
    # Here: where one of them is the default, the parsed options no longer tell.
    if {"--replace", "--resume"} <= {*words}:
        raise ValueError(REPLACE_OR_RESUME)
    # Any: the overloads of `command` leave out the classes that it takes.
    app: Any = tyro.extras.SubcommandApp()
    experiments: Any = tyro.extras.SubcommandApp()
    for name, experiment in EXPERIMENTS.items():
        experiments.command(name=name)(experiment)
    app.command(name="demo")(Demo)
    app.command(
        experiments,
        name="train",
        help="Train the networks of one of the paper's experiments, instrumented.",
    )
    for name, command in {"sweep": Sweep, **COMMANDS}.items():
        app.command(name=name)(command)
    return app.cli(
        prog="biasshift",
        description="Measure, test and exploit bias shift and the unit natural gradient.",
        args=words,
    )


def _command(options: Any) -> Callable[[Console], None]:
    """What carries out a command. All that it needs is imported in here: help and wrong options
    come without pandas, Matplotlib and the figures, and Ctrl-C stays silent until `started`.
    """
    if isinstance(options, Claims):
        from biasshift.cli.claims import judge

        return lambda console: judge(console, options)
    if isinstance(options, Runs):
        from biasshift.cli.results import list_runs

        return lambda console: list_runs(console, options.runs)
    if isinstance(options, Report):
        from biasshift.report import report

        if not options.runs:
            raise ValueError("A report needs runs: `biasshift report FOLDER`.")
        return lambda console: console.print(
            f"Report: {visible(str(report(options.runs, options.out)))}", soft_wrap=True
        )
    from biasshift.cli.train import run_experiment

    if isinstance(options, Figure):
        from biasshift.cli.figure import draw_figures

        return lambda console: draw_figures(console, options, parse, run_experiment)
    return lambda console: run_experiment(console, options)
