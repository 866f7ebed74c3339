"""The command ``biasshift figure``: from runs, or the tables of the package, to pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from biasshift import figures
from biasshift.cli.commands import Figure
from biasshift.cli.console import print_paths, watched
from biasshift.escapes import visible


def draw_figures(
    console: Console,
    options: Figure,
    parse: Callable[[Sequence[str]], Any],
    train: Callable[[Console, Any], None],
) -> None:
    """Draws one figure, or all that can be drawn, and prints the numbers that they show.

    Args:
        parse: From the words of a training command to its experiment, for --quick.
        train: What trains an experiment, for --quick.

    Raises:
        ValueError: Runs lack what the figure shows, or there are none and the package has no table
            for it. Or options contradict each other.
    """
    if not options.quick and (options.smoke or options.data is not None):
        raise ValueError(
            "--smoke and --data change what --quick trains. Give --quick too, or leave them out."
        )
    if options.save is not None and options.name == "1":
        raise ValueError(
            "--save must be left out: figure 1 shows functions, so that it has no table of runs."
        )
    paths = options.runs
    if options.quick:
        paths = (options.out / f"quick-{options.name}",)
        for experiment in _quick_experiments(options, parse, *paths):
            train(console, experiment)
    if options.name == "all":
        tables, reasons = figures.drawable(paths)
    else:
        tables, reasons = {options.name: figures.data(options.name, *paths)}, {}
    with watched(console, "figure") as bar:
        bar.begin(len(tables), "figures")
        for name, table in tables.items():
            bar.pause()
            _draw_figure(console, options, name, table)
            bar.advance()
    for name, reason in reasons.items():
        console.print(f"Left out: figure {name}. {reason}", soft_wrap=True)


def _draw_figure(console: Console, options: Figure, name: str, table: pd.DataFrame | None) -> None:
    if table is not None and options.quick:
        table = table.assign(made="smoke" if options.smoke else "quick")
    caption = figures.caption(name, table)
    picture = figures.picture(name, table)
    print_paths(console, figures.write(name, picture, options.out, caption))
    _print_numbers(console, name, table)
    if options.save is not None and table is not None:
        paths = (options.out / f"quick-{options.name}",) if options.quick else options.runs
        saved = figures.save(figures.ALIASES.get(name, name), table, paths, options.save)
        console.print(f"Table: {visible(str(saved))}", soft_wrap=True)


def _quick_experiments(
    options: Figure, parse: Callable[[Sequence[str]], Any], folder: Path
) -> list[Any]:
    """The shortened experiments of a figure, which write into the folder."""
    if options.runs:
        raise ValueError(
            "--quick trains runs of its own: leave the folders out, or leave --quick out."
        )
    spec = figures.FIGURES.get(figures.ALIASES.get(options.name, options.name))
    if spec is None or not spec.quick:
        raise ValueError(
            f"--quick trains for one figure that shows runs, got '{options.name}'. Name another "
            "figure, or leave --quick out."
        )
    words = ["--out", str(folder), "--replace", *["--smoke"] * options.smoke]
    experiments = [parse([*command.split(), *words]) for command in spec.quick]
    if options.data is None:
        return experiments
    if not all(hasattr(experiment, "data") for experiment in experiments):
        raise ValueError(
            f"--data must be left out: the data of figure {options.name} comes with the package."
        )
    return [replace(experiment, data=options.data) for experiment in experiments]


def _print_numbers(console: Console, name: str, table: pd.DataFrame | None) -> None:
    """The caption, and the numbers of a figure beside the paper's, if it shows any."""
    numbers = figures.numbers(name, table)
    if not numbers:
        return
    console.print(figures.caption(name, table))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["", "here"] + ["paper"] * any(number.paper != "–" for number in numbers)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for number in numbers:
        shown.add_row(*number[: len(columns)])
    console.print(shown)
