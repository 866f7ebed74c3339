"""The command line: ``biasshift demo | train | sweep | figure | claims | runs | report``.

Options are typed dataclasses, from which tyro makes the parser and the help. Those of ``demo``,
``train`` and ``sweep`` are the experiments themselves; the others are in `biasshift.cli.commands`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import tyro
from rich.console import Console

from biasshift._sigint import INTERRUPTED, started
from biasshift.cli.commands import Claims, Figure, Report, Runs
from biasshift.cli.console import error_message
from biasshift.distributed import under_torchrun
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
COMMANDS = {"figure": Figure, "claims": Claims, "runs": Runs, "report": Report}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program ``biasshift``.

    The exit status is 0 after success and 130 after Ctrl-C. It is 2 for bad input, of which one
    sentence on stderr gives the cause and the remedy. It is 1 where nobody reads the output.

    Args:
        arguments: The words behind ``biasshift``; by default those of this process.

    Raises:
        SystemExit: The status is not 0, or the help was asked for.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--version"]:
        print(f"biasshift {metadata.version('biasshift')}")
        return
    try:
        run_command = _command(parse(words))
        started()
        # Without markup: a path may hold brackets and colons.
        console = Console(highlight=False, markup=False, emoji=False)
        console.quiet = under_torchrun() and int(os.environ.get("RANK", "0")) > 0
        run_command(console)
    except BrokenPipeError:  # the reader of the output has gone
        # Or Python complains once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"biasshift: {error_message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "biasshift: interrupted. Finished runs are complete; the others are readable up to "
            "their last flush. The same command with --resume continues them.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


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
        from biasshift.cli.results import print_runs
        from biasshift.runs.reader import read_runs, run_states

        return lambda console: print_runs(
            console, run_states(*options.runs), read_runs(*options.runs, units=False)
        )
    if isinstance(options, Report):
        from biasshift.report import report

        if not options.runs:
            raise ValueError("A report needs runs: `biasshift report FOLDER`.")
        return lambda console: console.print(
            f"Report: {report(options.runs, options.out)}", soft_wrap=True
        )
    from biasshift.cli.train import run_experiment

    if isinstance(options, Figure):
        from biasshift.cli.figure import draw_figures

        return lambda console: draw_figures(console, options, parse, run_experiment)
    return lambda console: run_experiment(console, options)
