"""Figures as files: runs, or the small tables that stand for them → the panels of `biasshift.plots`
→ PNG and PDF.

spec        what a figure consists of
selection   which of the given runs it is about
captions    what it says about them
files       both files or none
tables      small tables with their origin
mlp, convnets, theory, sweep, benchmarks     the figures
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.figures import (
    benchmarks,
    convnets,
    mlp,
    sweep,
    theory,
)
from biasshift.figures.captions import described
from biasshift.figures.files import in_a_sentence, write_both
from biasshift.figures.selection import chosen, read, refuse_mixture, with_length
from biasshift.figures.spec import NOTHING, Drawing, Number
from biasshift.figures.tables import committed, load, save

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

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

_ORDER = (
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "table1",
    "theory1",
    "theory2",
    "theory3",
    "theory4",
    "bench",
)
_FOUND = mlp.FIGURES | convnets.FIGURES | theory.FIGURES | sweep.FIGURES | benchmarks.FIGURES
FIGURES: dict[str, Drawing] = {name: _FOUND[name] for name in _ORDER}
ALIASES = {"gap": "theory1"}


def data(name: str, *paths: str | os.PathLike[str]) -> pd.DataFrame | None:
    """Returns the small table that a figure shows: of the given runs, or else the one that comes
    with the package.

    Raises:
        ValueError: no such figure or table; runs that lack what it shows.
    """
    drawing = _drawing(name)
    if options := [
        str(path) for path in paths if str(path).startswith("-") and not os.path.exists(path)
    ]:
        raise ValueError(
            f"'{options[0]}' is no folder of runs: `biasshift figure` takes options, this takes "
            "folders."
        )
    if name == "1":
        if paths:
            raise ValueError("Figure 1 shows functions, and no runs: leave the folders out.")
        return None
    if paths:
        return condensed(
            name, benchmarks.read_benchmarks(*paths) if name == "bench" else read(*paths)
        )
    table = committed(ALIASES.get(name, name))
    if table is None:
        raise ValueError(
            f"Figure {name} shows runs, and none come with this version: "
            f"make them with `{drawing.runs}`, then `biasshift figure {name} FOLDER`."
        )
    return load(table)


def condensed(name: str, table: pd.DataFrame | None) -> pd.DataFrame:
    """Returns the small table of a figure from the table of `biasshift.runs.reader.read_runs`.

    Raises:
        ValueError: the runs lack what the figure shows.
    """
    drawing = _drawing(name)
    table = _there(name, table)
    if name in ("1", "bench"):
        return drawing.condense(table)
    plots.need(table, ["run", "step"], f"figure {name}")
    rows = chosen(table, drawing.experiments, drawing.prefer, f"make them with `{drawing.runs}`.")
    refuse_mixture(rows, name, drawing.apart, drawing.unshown)
    small = drawing.condense(with_length(rows))
    small.attrs = {key: rows.attrs[key] for key in ("left_out",) if key in rows.attrs}
    return small


def picture(name: str, table: pd.DataFrame | None) -> Figure:
    """Returns a figure of its small table, in the project's style; figure 1 has none.

    Raises:
        ValueError: no such figure, or no table.
    """
    drawing = _drawing(name)
    with plots.style():
        return drawing.panels(table if name == "1" else _there(name, table))


def numbers(name: str, table: pd.DataFrame | None) -> list[Number]:
    """Returns the numbers that a figure shows, each beside the paper's."""
    return [] if table is None else _drawing(name).numbers(table)


def caption(name: str, table: pd.DataFrame | None) -> str:
    """Returns what the figure is, what runs it shows, which of the given ones it leaves out, and
    what the paper's shows.
    """
    drawing = _drawing(name)
    parts = [drawing.title]
    if table is not None:
        parts += [f"Shown: {shown}"] if (shown := described(drawing.shown(table))) else []
        parts += [f"Left out: {', '.join(left)}"] if (left := table.attrs.get("left_out")) else []
    parts += [f"Paper: {drawing.paper}"] if drawing.paper else []
    if table is not None and not drawing.fits(table):
        parts.append(
            "These runs are of another kind or length than the paper's, so that its numbers do not "
            "stand beside theirs"
        )
    return " ".join(f"{part}." for part in parts)


def said(name: str, table: pd.DataFrame | None) -> str:
    """Returns the caption, and a line for every number that the figure shows, beside the paper's."""
    lines = [
        f"  {number.quantity}: {number.here}"
        + (f"  (paper: {number.paper})" if number.paper != NOTHING else "")
        for number in numbers(name, table)
    ]
    return "\n".join([caption(name, table), *lines])


def write(
    name: str, figure: Figure, folder: str | os.PathLike[str] = "figures", words: str = ""
) -> list[Path]:
    """Writes a figure as PNG and PDF, with its caption in the files; returns the paths.

    Raises:
        ValueError: no such figure, or it is none of Matplotlib's.
        OSError: they cannot be written; then none of them is.
    """
    _drawing(name)
    if not hasattr(figure, "savefig"):
        raise ValueError(
            f"A figure is what `biasshift.figures.picture` returns, not {type(figure).__name__}."
        )
    return write_both(name, figure, Path(folder), words)


def script(name: str, *paths: str) -> Figure:
    """What a script of `paper_figs` does: returns a figure, of run folders or of the package's
    table, and prints files and numbers.

    Raises:
        SystemExit: with one sentence and status 2, where the runs cannot be drawn.
    """
    with in_a_sentence():
        table = data(name, *paths)
        figure = picture(name, table)
        for path in write(name, figure, words=caption(name, table)):
            print(path)
        print(said(name, table))
        return figure


def draw(name: str, table: pd.DataFrame | None, folder: Path) -> list[Path]:
    """Draws a figure of run folders' table and writes it as PNG and PDF; returns the paths.

    Raises:
        ValueError: for a figure that does not exist, or runs that lack what it shows.
    """
    small = None if name == "1" else condensed(name, table)
    return write(name, picture(name, small), folder, caption(name, small))


def drawable(
    paths: Sequence[str | os.PathLike[str]],
) -> tuple[dict[str, pd.DataFrame | None], dict[str, str]]:
    """Returns the small tables of all figures that the given runs, or without runs the package, can
    draw; and why not the others.
    """
    found: dict[str, pd.DataFrame | None] = {}
    left: dict[str, str] = {}
    table = read(*paths) if paths else None
    for name in FIGURES:
        try:
            if table is None or name == "1":
                found[name] = data(name)
            elif name == "bench":
                left[name] = (
                    "It shows no runs: give it a folder that `python -m benchmarks` wrote into."
                )
            else:
                found[name] = condensed(name, table)
        except ValueError as error:
            left[name] = str(error)
    return found, left


def _there(name: str, table: pd.DataFrame | None) -> pd.DataFrame:
    if table is None:
        raise ValueError(f"Figure '{name}' shows runs, and there are none.")
    if not hasattr(table, "columns"):
        raise ValueError(
            f"Figure '{name}' is drawn of a table, as `biasshift.figures.data` returns it, not of "
            f"{type(table).__name__}."
        )
    return table


def _drawing(name: str) -> Drawing:
    if (found := FIGURES.get(ALIASES.get(name, name))) is None:
        raise ValueError(
            f"There is no figure '{name}': choose one of {', '.join([*FIGURES, *ALIASES])}."
        )
    return found
