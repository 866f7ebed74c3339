"""What finished runs show, on the terminal: scores, identities, verdicts, learning rates."""

from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from biasshift.analysis.formatting import READING, VERDICTS, effect, reading_table, sweep_table
from biasshift.analysis.quantities import per_run
from biasshift.analysis.verdicts import claims
from biasshift.cli.console import print_wrapped
from biasshift.escapes import visible

IDENTITIES = {  # column of the table → the identity whose relative residual it holds
    "residual_theorem1": "Theorem 1, centered against block form",
    "residual_identity": "mᵀΔw + Δw₀ = g₀/c",
    "residual_theorem2": "Theorem 2 against the shift of the update itself",
    "residual_bookkeeping": "own + incoming + second order = measured bias shift",
}
VERDICTS_TITLE = "What these runs say about the paper's claims"
VERDICTS_NOTE = (
    "Effects are paired by seed, with 95 % intervals. Verdicts go by p, corrected (Holm) for the "
    "variants of a statement."
)


def print_comparison(console: Console, table: pd.DataFrame) -> None:
    """Prints the means and spreads over seeds, a row per quantity and a column per activation."""
    means = reading_table(per_run(table))
    # In a narrow terminal a cell may break in front of its ±.
    cells = means.map(lambda text: text.replace("± ", "±").replace(" = ", "="))
    # Of many activation functions, a few at a time: in narrow columns nobody can read.
    size = max(4, (console.width - 24) // 12)
    for start in range(0, len(cells.columns), size):
        _print_table(console, "Mean ± SD over seeds", cells.iloc[:, start : start + size])
    console.print(READING)


def print_sweep(console: Console, table: pd.DataFrame) -> None:
    """Prints the training losses at all learning rates, a row per kind of run.

    A star marks the learning rate at which each kind of run is judged.
    """
    losses = sweep_table(per_run(table))
    _print_table(console, "Training loss at every learning rate, mean ± SD over seeds", losses)


def print_identities(console: Console, table: pd.DataFrame) -> None:
    """Prints how exact the exact identities are, or nothing where runs did not measure them."""
    if not set(IDENTITIES) <= set(table):
        return
    console.print(
        "\nExact identities (largest relative residual over all runs, float64)", style="bold"
    )
    for column, name in IDENTITIES.items():
        console.print(f"  {table[column].max():.1e}  {name}")


def print_verdicts(console: Console, table: pd.DataFrame) -> None:
    """Prints the claims by verdict, a line or two each.

    What speaks against taking them for more is in their caveats, which `biasshift claims` shows.
    """
    judged = claims(table, progress=False)
    console.print(f"\n{VERDICTS_TITLE}", style="bold")
    console.print(VERDICTS_NOTE)
    for verdict, words in VERDICTS.items():
        rows: Any = judged[judged["verdict"] == verdict]
        if len(rows):
            console.print(f"{words} ({len(rows)})")
        for row in rows.itertuples():
            size = effect(row) if row.n else "not measured"
            line = f"{row.statement} ({row.source}). {row.statistic}: {size}, n = {row.n}."
            print_wrapped(console, line, indent=" " * 2, hanging=" " * 4)
    console.print("Their caveats: biasshift claims FOLDER")


def _print_table(console: Console, title: str, cells: pd.DataFrame) -> None:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", *cells.columns):
        shown.add_column(
            visible(str(column)), justify="right" if column else "left", overflow="fold"
        )
    for name, row in cells.iterrows():
        shown.add_row(visible(str(name)), *map(str, row))
    console.print(shown)
