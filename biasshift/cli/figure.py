"""`biasshift figure`: from run folders, quickly trained ones, or the package's tables to pictures
and numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from biasshift.cli.commands import Figure
from biasshift.cli.console import say_paths
from biasshift.cli.train import train
from biasshift.figures import (
    ALIASES,
    FIGURES,
    caption,
    data,
    drawable,
    numbers,
    picture,
    save,
    write,
)

if TYPE_CHECKING:
    import pandas as pd


def draw_figures(console: Console, options: Figure, parsed: Callable[[Sequence[str]], Any]) -> None:
    """Draws one figure, or all that can be drawn, and says what they show.

    Args:
        parsed: from the words of a command line to what trains it, for --quick.

    Raises:
        ValueError: runs that lack what the figure shows, or no runs where none come with the
            package; options that contradict each other.
    """
    if options.smoke and not options.quick:
        raise ValueError("--smoke is about what --quick trains: give both, or leave it out.")
    if options.data is not None and not options.quick:
        raise ValueError("--data is about what --quick trains: give both, or leave it out.")
    if options.save is not None and options.name == "1":
        raise ValueError(
            "--save keeps the table of the runs that a figure shows, and figure 1 shows none: "
            "leave it out."
        )
    paths = (_trained(console, options, parsed),) if options.quick else options.runs
    found, left = (
        drawable(paths)
        if options.name == "all"
        else ({options.name: data(options.name, *paths)}, {})
    )
    for name, table in found.items():
        table = (
            table
            if table is None or not options.quick
            else table.assign(made="smoke" if options.smoke else "quick")
        )
        say_paths(console, write(name, picture(name, table), options.out, caption(name, table)))
        _say_numbers(console, name, table)
        if options.save is not None and table is not None:
            console.print(
                f"Table: {save(ALIASES.get(name, name), table, paths, options.save)}",
                soft_wrap=True,
            )
    for name, reason in left.items():
        console.print(f"Left out: figure {name}. {reason}", soft_wrap=True)


def _trained(console: Console, options: Figure, parsed: Callable[[Sequence[str]], Any]) -> Path:
    """The folder of a figure's shortened runs, trained now."""
    if options.runs:
        raise ValueError("--quick trains runs of its own: leave the folders out, or the option.")
    commands = (
        FIGURES[ALIASES.get(options.name, options.name)].quick if options.name != "all" else ()
    )
    if not commands:
        raise ValueError(
            f"--quick trains for one figure that shows runs, and '{options.name}' is none: leave "
            "it out."
        )
    out = options.out / f"quick-{options.name}"
    for command in commands:
        made = parsed(
            [
                *command.split(),
                "--out",
                str(out),
                "--replace",
                *(["--smoke"] if options.smoke else []),
            ]
        )
        train(console, made if options.data is None else _with_data(made, options.data))
    return out


def _with_data(experiment: Any, folder: Path) -> Any:
    if not hasattr(experiment, "data"):
        raise ValueError(
            "--data names a folder of data, and what this figure trains on comes with the package: "
            "leave it out."
        )
    return replace(experiment, data=folder)


def _say_numbers(console: Console, name: str, table: "pd.DataFrame | None") -> None:
    """The caption, and the numbers of a figure beside the paper's, if it shows any."""
    found = numbers(name, table)
    if not found:
        return
    console.print(caption(name, table))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = (
        ("", "here", "paper") if any(number.paper != "–" for number in found) else ("", "here")
    )
    for column in columns:
        shown.add_column(column, overflow="fold")
    for number in found:
        shown.add_row(*number[: len(columns)])
    console.print(shown)
