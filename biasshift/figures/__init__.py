"""Figures as files: runs → a small table → the panels of `biasshift.plots` → PNG and PDF.

spec        what a figure consists of
selection   which of the given runs it is about
captions    what it says about them
files       both files or none
tables      small tables with their origin, which stand for runs
mlp, convnets, theory, sweep, benchmarks     the figures
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from biasshift import plots
from biasshift.figures import benchmarks, convnets, mlp, sweep, theory
from biasshift.figures.captions import described
from biasshift.figures.files import in_a_sentence, write_both
from biasshift.figures.selection import chosen, read, refuse_mixture, with_length
from biasshift.figures.spec import NOTHING, FigureSpec, Number
from biasshift.figures.tables import committed, load, save

__all__ = [
    "ALIASES",
    "FIGURES",
    "caption",
    "condensed",
    "data",
    "described",
    "draw",
    "drawable",
    "in_a_sentence",
    "numbers",
    "picture",
    "read",
    "said",
    "save",
    "script",
    "write",
]

_ORDER = "1 2 3 4 5 6 7 table1 theory1 theory2 theory3 theory4 bench".split()
_SPECS = mlp.FIGURES | convnets.FIGURES | theory.FIGURES | sweep.FIGURES | benchmarks.FIGURES
FIGURES: dict[str, FigureSpec] = {name: _SPECS[name] for name in _ORDER}
ALIASES = {"gap": "theory1"}


def data(name: str, *paths: str | os.PathLike[str]) -> pd.DataFrame | None:
    """Returns the small table that a figure shows; None for figure 1, which shows functions.

    Args:
        name: a name or an alias of a figure.
        paths: folders of the runs to show; for "bench", files or folders that
            `python -m benchmarks` wrote. Without any, the table that comes with the package.

    Raises:
        ValueError: there is no such figure or table, or the runs lack what it shows.
    """
    spec = _spec(name)
    for path in map(str, paths):
        if path.startswith("-") and not os.path.exists(path):
            raise ValueError(
                f"'{path}' is not a folder of runs. Leave it out: only `biasshift figure` takes "
                "options."
            )
    if name == "1":
        if paths:
            raise ValueError("Figure 1 shows functions, not runs. Leave the folders out.")
        return None
    if paths:
        runs = benchmarks.read_benchmarks(*paths) if name == "bench" else read(*paths)
        return condensed(name, runs)
    table = committed(ALIASES.get(name, name))
    if table is None:
        raise ValueError(
            f"Figure {name} shows runs, and none come with this version. Make them with "
            f"`{spec.command}`, then `biasshift figure {name} FOLDER`."
        )
    return load(table)


def condensed(name: str, table: pd.DataFrame | None) -> pd.DataFrame:
    """Returns the small table of a figure, made of the table of `read`.

    Of the runs, only those that the figure is about are taken. What was left out is listed in
    `attrs["left_out"]`, and the caption says so.

    Raises:
        ValueError: there is no such figure, or the runs lack what it shows, or runs of several
            settings would be taken for seeds of one.
    """
    spec, table = _spec(name), _checked(name, table)
    if name in ("1", "bench"):
        return spec.condense(table)
    plots.need(table, ["run", "step"], f"figure {name}")
    rows = chosen(table, spec.experiments, spec.prefer, f"Make them with `{spec.command}`")
    refuse_mixture(rows, name, spec.compared, spec.irrelevant)
    small = spec.condense(with_length(rows))
    small.attrs = {key: rows.attrs[key] for key in ("left_out",) if key in rows.attrs}
    return small


def picture(name: str, table: pd.DataFrame | None) -> plots.Figure:
    """Returns a figure of its small table, in the project's style.

    Args:
        table: as `data` or `condensed` return it; None for figure 1.

    Raises:
        ValueError: there is no such figure, or no table.
    """
    spec = _spec(name)
    with plots.style():
        return spec.panels(table if name == "1" else _checked(name, table))


def numbers(name: str, table: pd.DataFrame | None) -> list[Number]:
    """Returns the numbers that a figure shows, each beside the paper's; none without a table."""
    return [] if table is None else _spec(name).numbers(table)


def caption(name: str, table: pd.DataFrame | None) -> str:
    """Returns a caption: what the figure is, and what runs it shows.

    It also says which of the given runs are left out and what the paper's figure shows. Where the
    paper's numbers are of another kind of runs, it says that, too.
    """
    spec = _spec(name)
    parts = [spec.title]
    if table is not None:
        parts += [f"Shown: {shown}"] if (shown := described(spec.drawn(table))) else []
        parts += [f"Left out: {', '.join(left)}"] if (left := table.attrs.get("left_out")) else []
    parts += [f"Paper: {spec.paper}"] if spec.paper else []
    if table is not None and not spec.comparable(table):
        parts.append(
            "These runs are of another kind or length than the paper's, so that its numbers do not "
            "stand beside theirs"
        )
    return " ".join(f"{part}." for part in parts)


def said(name: str, table: pd.DataFrame | None) -> str:
    """Returns the caption, and a line for every number that the figure shows.

    Where the paper has the same number, it stands behind the one that was measured here.
    """
    lines = [
        f"  {number.quantity}: {number.here}"
        + (f"  (paper: {number.paper})" if number.paper != NOTHING else "")
        for number in numbers(name, table)
    ]
    return "\n".join([caption(name, table), *lines])


def write(
    name: str, figure: Any, folder: str | os.PathLike[str] = "figures", words: str = ""
) -> list[Path]:
    """Writes a figure as PNG and PDF and returns the paths, `figure_<name>.png` and `.pdf`.

    Args:
        figure: as `picture` returns it.
        folder: is made if it does not exist.
        words: the caption, for the metadata of the files.

    Raises:
        ValueError: there is no such figure, or `figure` is not one of Matplotlib's.
        OSError: they cannot be written; then none of them is.
    """
    _spec(name)
    if not hasattr(figure, "savefig"):
        raise ValueError(
            f"'figure' must be what `biasshift.figures.picture` returns, got "
            f"{type(figure).__name__}."
        )
    return write_both(name, figure, Path(folder), words)


def script(name: str, *paths: str) -> plots.Figure:
    """Draws, writes and returns a figure: all that a script of `paper_figs` does.

    It prints the paths of the files, the caption and the numbers.

    Args:
        paths: run folders; without any, the package's table is drawn.

    Raises:
        SystemExit: with a message and status 2, where the runs cannot be drawn.
    """
    with in_a_sentence():
        table = data(name, *paths)
        figure = picture(name, table)
        for path in write(name, figure, words=caption(name, table)):
            print(path)
        print(said(name, table))
        return figure


def draw(name: str, table: pd.DataFrame | None, folder: Path) -> list[Path]:
    """Draws a figure of a table of runs and writes it as PNG and PDF; returns the paths.

    Args:
        table: as `read` returns it, not condensed; None for figure 1.

    Raises:
        ValueError: there is no such figure, or the runs lack what it shows. Nothing is written.
    """
    small = None if name == "1" else condensed(name, table)
    return write(name, picture(name, small), folder, caption(name, small))


def drawable(
    paths: Sequence[str | os.PathLike[str]],
) -> tuple[dict[str, pd.DataFrame | None], dict[str, str]]:
    """Returns the small tables of all figures that can be drawn, and why not the others.

    Args:
        paths: run folders; without any, the tables that come with the package are drawn.
    """
    tables: dict[str, pd.DataFrame | None] = {}
    reasons = {}
    runs = read(*paths) if paths else None
    for name in FIGURES:
        try:
            if runs is None or name == "1":
                tables[name] = data(name)
            elif name == "bench":
                reasons[name] = "It shows benchmarks: give a folder of `python -m benchmarks`."
            else:
                tables[name] = condensed(name, runs)
        except ValueError as error:
            reasons[name] = str(error)
    return tables, reasons


def _checked(name: str, table: pd.DataFrame | None) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        got = "none" if table is None else type(table).__name__
        raise ValueError(
            f"Figure '{name}' shows a table of runs, got {got}. Give what "
            "`biasshift.figures.data` returns."
        )
    return table


def _spec(name: str) -> FigureSpec:
    if (spec := FIGURES.get(ALIASES.get(name, name))) is None:
        raise ValueError(
            f"Figure '{name}' does not exist. Choose one of {', '.join([*FIGURES, *ALIASES])}."
        )
    return spec
