"""What finished runs show, on one screen: scores, the main claims, and where to read more."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from biasshift.analysis.formatting import (
    MARKS,
    VERDICTS,
    effect,
    main_claims,
    reading_table,
    sweep_table,
)
from biasshift.analysis.quantities import per_run
from biasshift.analysis.statistics import seeds_needed
from biasshift.analysis.verdicts import claims
from biasshift.cli.console import print_wrapped
from biasshift.escapes import visible

IDENTITIES = {  # column of the table → the identity whose relative residual it holds
    "residual_theorem1": "Theorem 1",
    "residual_identity": "mᵀΔw + Δw₀ = g₀/c",
    "residual_theorem2": "Theorem 2",
    "residual_bookkeeping": "parts of the bias shift",
}
SHORT = {  # column of `per_run` → its name on the screen
    "unit_mean": "mean activation",
    "inherited": "shift inherited",
    "train_loss": "training loss, end",
    "exam_step": "steps to same loss",
    "exam_inflation": "coupling 1/(1−h) *",
    "exam_gap_degrees": "gradient gap (°) *",
}
AT_EQUAL_LOSS = "* at equal training loss, medians over units"
VERDICTS_TITLE = "What these runs say about the paper's claims"
VERDICTS_NOTE = (
    "Effects are paired by seed, with 95 % intervals. Verdicts go by p, corrected (Holm) for the "
    "variants of a statement."
)


def print_comparison(console: Console, table: pd.DataFrame) -> None:
    """Prints the means and spreads over seeds, a row per quantity and a column per activation."""
    means = reading_table(per_run(table), SHORT).drop("seeds")
    # In a narrow terminal a cell may break in front of its ±.
    cells = means.map(lambda text: text.replace("± ", "±").replace(" = ", "="))
    # Of many activation functions, a few at a time: in narrow columns nobody can read.
    size = max(4, (console.width - 24) // 12)
    for start in range(0, len(cells.columns), size):
        _print_table(console, "Mean ± SD over seeds", cells.iloc[:, start : start + size])
    console.print(AT_EQUAL_LOSS)


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
    worst: Any = table[[*IDENTITIES]].max()
    name = str(worst.idxmax())
    console.print(f"Exact identities hold to {worst[name]:.1e} (worst: {IDENTITIES[name]}).")


def print_verdicts(console: Console, table: pd.DataFrame) -> None:
    """Prints six claims with their intervals, and how many statements were judged in all.

    Runs of too few seeds to decide any of them claim nothing.
    """
    seeds = len(set(table["seed"])) if "seed" in table else 0
    if 0 < seeds < seeds_needed(1):
        console.print(
            f"\nThese runs claim nothing: {seeds} seed{'s' if seeds > 1 else ''} cannot decide, "
            f"{seeds_needed(1)} can."
        )
        return
    judged = claims(table, progress=False)
    measured: Any = judged[judged["n"] > 0]
    main = main_claims(judged)
    console.print(f"\n{_conclusion(main, seeds)}", style="bold")
    rows: Any = main.itertuples()
    for row in rows:
        line = f"{MARKS[row.verdict]} {row.statement}"
        print_wrapped(console, line, indent=" ", hanging=" " * 3)
        size = f"{row.statistic}: {effect(row)} ({row.predicted})"
        print_wrapped(console, size, indent=" " * 5, hanging=" " * 7)
    console.print(_counts(judged, measured))


def print_next(console: Console, out: Path) -> None:
    """Prints three commands that show more of the runs below a folder."""
    folder = visible(shlex.quote(str(out)))
    lines = {
        f"biasshift claims {folder}": "every statement, with its caveats",
        f"biasshift report {folder}": "one page to look at the runs",
        "biasshift train mnist": "the same on MNIST, as in the paper",
    }
    width = max(map(len, lines))
    console.print("Next:", style="bold")
    for command, purpose in lines.items():
        line = f"  {command:{width}}  {purpose}"
        console.print(line if len(line) <= console.width else f"  {command}", soft_wrap=True)


def _conclusion(main: pd.DataFrame, seeds: int) -> str:
    counts = main["verdict"].value_counts()
    words = [
        f"{counts[verdict]} {word.lower()}"
        for verdict, word in VERDICTS.items()
        if verdict in counts
    ]
    claimed = f"{len(main)} main claim{'s' if len(main) != 1 else ''} of the paper"
    return f"{claimed}, {seeds} paired seeds: {', '.join(words)}."


def _counts(judged: pd.DataFrame, measured: pd.DataFrame) -> str:
    found = measured["verdict"].tolist()
    supported, contradicted = found.count("supported"), found.count("not supported")
    return (
        f"{len(measured)} of {len(judged)} statements were measured: {supported} supported, "
        f"{contradicted} contradicted.\nIn brackets: 95 % interval, predicted sign."
    )


def _print_table(console: Console, title: str, cells: pd.DataFrame) -> None:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", *cells.columns):
        shown.add_column(
            visible(str(column)), justify="right" if column else "left", overflow="fold"
        )
    for name, row in cells.iterrows():
        shown.add_row(visible(str(name)), *map(str, row))
    console.print(shown)
