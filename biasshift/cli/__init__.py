"""The command line: `biasshift demo | train | sweep | figure | claims | runs | report`, generated
from typed dataclasses.
"""

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import tyro
from rich.console import Console

from biasshift._sigint import INTERRUPTED, started
from biasshift.cli import train
from biasshift.cli.claims import judge
from biasshift.cli.commands import Claims, Figure, Report, Runs
from biasshift.cli.console import say_runs, sentence
from biasshift.cli.figure import draw_figures
from biasshift.distributed import under_torchrun
from biasshift.experiments.autoencoder import Autoencoder
from biasshift.experiments.cifar11 import Cifar11
from biasshift.experiments.cifar18 import Cifar18
from biasshift.experiments.demo import Demo
from biasshift.experiments.experiment import REPLACE_OR_RESUME
from biasshift.experiments.imagenet import Imagenet
from biasshift.experiments.mnist import Mnist
from biasshift.experiments.sweep import Sweep
from biasshift.report import report
from biasshift.runs.reader import read_runs, run_states

EXPERIMENTS = {
    "mnist": Mnist,
    "autoencoder": Autoencoder,
    "cifar11": Cifar11,
    "cifar18": Cifar18,
    "imagenet": Imagenet,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `biasshift`. Exit status 0; 2 for bad input, with one sentence; 130 when
    interrupted.
    """
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"biasshift {metadata.version('biasshift')}")
        return
    try:
        started()
        _carry_out(_parsed(arguments))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains once more while it ends
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"biasshift: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "biasshift: interrupted. Finished runs are complete, the others are readable up to "
            "their last flush; "
            "the same command with --resume goes on.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


def _parsed(arguments: Sequence[str] | None) -> Any:
    words = sys.argv[1:] if arguments is None else arguments
    if {"--replace", "--resume"} <= {
        *words
    }:  # here: where one of them is the default, the parsed options no longer tell
        raise ValueError(REPLACE_OR_RESUME)
    experiments: Any = (
        tyro.extras.SubcommandApp()
    )  # Any: its overloads leave out the classes that it takes
    for name, experiment in EXPERIMENTS.items():
        experiments.command(name=name)(experiment)
    app: Any = tyro.extras.SubcommandApp()
    app.command(name="demo")(Demo)
    app.command(
        experiments,
        name="train",
        help="Train the networks of one of the paper's experiments, instrumented.",
    )
    app.command(name="sweep")(Sweep)
    for name, command in {
        "figure": Figure,
        "claims": Claims,
        "runs": Runs,
        "report": Report,
    }.items():
        app.command(name=name)(command)
    return app.cli(
        prog="biasshift",
        description="Measure, test and exploit bias shift and the unit natural gradient.",
        args=arguments,
    )


def _carry_out(options: Any) -> None:
    console = Console(
        highlight=False, markup=False, emoji=False
    )  # a path may hold brackets and colons
    if under_torchrun() and int(os.environ.get("RANK", "0")) > 0:
        console.quiet = True
    if isinstance(options, Figure):
        draw_figures(console, options, _parsed)
    elif isinstance(options, Claims):
        judge(console, options)
    elif isinstance(options, Runs):
        say_runs(console, run_states(*options.runs), read_runs(*options.runs, units=False))
    elif isinstance(options, Report):
        if not options.runs:
            raise ValueError("reports are about runs: biasshift report FOLDER.")
        console.print(f"Report: {report(options.runs, options.out)}", soft_wrap=True)
    else:
        train.train(console, options)


if __name__ == "__main__":
    main()
