"""The command line: `biasshift demo | train | figure | claims`, generated from typed dataclasses."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from biasshift.claims import claims, sentences
from biasshift.classifying import Setting, run
from biasshift.data import DataSet
from biasshift.experiments.digits import Demo
from biasshift.experiments.mnist import Mnist
from biasshift.figures import FIGURES, draw
from biasshift.layout import is_run, read_config
from biasshift.pool import cores, run_jobs
from biasshift.reading import read_runs
from biasshift.summary import READING, per_run, reading_table

if TYPE_CHECKING:
    import pandas as pd

Experiment = Demo | Mnist

IDENTITIES = {
    "residual_theorem1": "Theorem 1, centered against block form",
    "residual_identity": "mᵀΔw + Δw₀ = g₀/c",
    "residual_theorem2": "Theorem 2 against the shift of the update itself",
    "residual_bookkeeping": "own + incoming + second order = measured bias shift",
}


@dataclass(frozen=True)
class Figure:
    """Draw a figure from run folders."""

    name: tyro.conf.Positional[Literal["1", "2", "gap", "all"]]
    """1 (activation functions), 2 (unit means and learning curves), gap (gradient gap against mean activation), or all."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders that contain them. Figure 1 needs none."""
    out: Path = Path("figures")
    """PNG and PDF are written here."""


@dataclass(frozen=True)
class Claims:
    """Say which claims of the paper the runs support."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that contain them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `biasshift`. Exit status 0; 2 for bad input, with one sentence; 130 when interrupted."""
    train: Any = tyro.extras.SubcommandApp()  # Any: its overloads leave out the classes that it takes
    train.command(name="mnist")(Mnist)
    app: Any = tyro.extras.SubcommandApp()
    app.command(name="demo")(Demo)
    app.command(train, name="train", help="Train the networks of one of the paper's experiments, instrumented.")
    app.command(name="figure")(Figure)
    app.command(name="claims")(Claims)
    try:
        options = app.cli(
            prog="biasshift", description="Measure, test and exploit bias shift and the unit natural gradient.", args=arguments
        )
        _carry_out(options)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more while it ends
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"biasshift: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("biasshift: interrupted. Finished runs are complete, the others are readable up to their last epoch.", file=sys.stderr)
        sys.exit(130)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}': {error.strerror}."
    return str(error)


def _carry_out(options: Demo | Mnist | Figure | Claims) -> None:
    console = Console(highlight=False, markup=False, emoji=False)  # a path may hold brackets and colons
    if isinstance(options, Figure):
        names = list(FIGURES) if options.name == "all" else [options.name]
        if names != ["1"] and not options.runs:
            raise ValueError(f"figure {options.name} shows runs: biasshift figure {options.name} FOLDER.")
        table = read_runs(*options.runs) if options.runs else None
        for name in names:
            _say_paths(console, draw(name, table, options.out))
    elif isinstance(options, Claims):
        if not options.runs:
            raise ValueError("claims are about runs: biasshift claims FOLDER.")
        _say_claims(console, read_runs(*options.runs))
    else:
        _train(console, options)


# -- training ------------------------------------------------------------------------------------------------------------


def _train(console: Console, experiment: Experiment) -> None:
    """Trains all runs of an experiment, then shows what they say: table, identities, figures, claims."""
    settings = experiment.settings()
    if experiment.workers is not None and experiment.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {experiment.workers}.")
    workers = min(experiment.workers or cores(), len(settings))
    folders = [experiment.out / f"{setting.activation}-{setting.seed}" for setting in settings]
    _refuse_taken(folders, settings[0].experiment, experiment.replace)
    # Wrong data, and a folder that cannot be written, are found here, once, before any process is started.
    _data(experiment)
    experiment.out.mkdir(parents=True, exist_ok=True)
    epochs = sum(setting.epochs for setting in settings)
    processes = f"{workers} process{'es' if workers > 1 else ''}"
    console.print(f"{len(settings)} runs of {settings[0].epochs} epochs in {processes} → {experiment.out}", soft_wrap=True)
    jobs = [(_run, (experiment, setting, folder)) for setting, folder in zip(settings, folders, strict=True)]
    with progress(console, epochs) as on_epoch:
        run_jobs(jobs, workers, on_epoch)
    table = read_runs(*folders)
    _say_table(console, table)
    _say_identities(console, table)
    for name in ("2", "gap"):
        _say_paths(console, draw(name, table, experiment.out))
    _say_claims(console, table)


def _refuse_taken(folders: list[Path], experiment: str, replace: bool) -> None:
    for folder in filter(is_run, folders):
        if not replace:
            raise ValueError(f"'{folder}' already holds a run: choose another --out, or give --replace.")
        if (other := read_config(folder).get("experiment")) != experiment:
            raise ValueError(f"'{folder}' holds a run of another experiment ('{other}'): choose another --out.")


@lru_cache(1)
def _data(experiment: Experiment) -> DataSet:
    return experiment.load()


def _run(experiment: Experiment, setting: Setting, folder: Path, on_epoch: Callable[[], None]) -> None:
    try:
        run(setting, _data(experiment), folder, "replace" if experiment.replace else "refuse", on_epoch)
    except RuntimeError as error:
        raise RuntimeError(f"'{folder}': {error}") from error


@contextmanager
def progress(console: Console, epochs: int) -> Iterator[Callable[[], None]]:
    """A live bar on a terminal, ten plain lines elsewhere; yields what to call after every epoch of every run."""
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=epochs)
            yield lambda: bar.advance(task)
        return
    done = 0

    def line() -> None:
        nonlocal done
        done += 1
        if done * 10 // epochs > (done - 1) * 10 // epochs:
            console.print(f"{done} of {epochs} epochs")

    yield line


# -- saying --------------------------------------------------------------------------------------------------------------


def _say_table(console: Console, table: "pd.DataFrame") -> None:
    found = reading_table(per_run(table))
    shown = Table(title="Mean ± SD over seeds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", *found.columns):
        shown.add_column(column, justify="right" if column else "left", overflow="fold")
    for quantity, row in found.iterrows():
        # In a narrow terminal a cell may break in front of its ±.
        shown.add_row(str(quantity), *(text.replace("± ", "±").replace(" = ", "=") for text in row))
    console.print(shown)
    console.print(READING)


def _say_identities(console: Console, table: "pd.DataFrame") -> None:
    console.print("\nExact identities (largest relative residual over all runs, float64)", style="bold")
    for column, name in IDENTITIES.items():
        console.print(f"  {table[column].max():.1e}  {name}")


def _say_paths(console: Console, paths: list[Path]) -> None:
    console.print(f"Figure: {paths[0]} (and {paths[-1].suffix[1:].upper()})", soft_wrap=True)


def _say_claims(console: Console, table: "pd.DataFrame") -> None:
    said = sentences(claims(table))
    console.print("\nWhat these runs say about the paper's claims", style="bold")
    console.print("Effects are ELU minus the other activation, paired by seed, with 95 % intervals, not corrected for their number.")
    for sentence in said:
        console.print(textwrap.fill(sentence, console.width, initial_indent="  ", subsequent_indent="  "), soft_wrap=True)


if __name__ == "__main__":
    main()
