"""The command ``biasshift claims``: verdicts with their caveats, on the terminal and as files."""

import textwrap
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from biasshift.analysis.formatting import claims_markdown, deciding_p, effect, footnote
from biasshift.analysis.verdicts import claims
from biasshift.atomic import replacing
from biasshift.cli.commands import Claims
from biasshift.cli.console import printable
from biasshift.cli.results import VERDICTS_NOTE, VERDICTS_TITLE
from biasshift.runs.provenance import provenance_sentence, table_provenance
from biasshift.runs.reader import read_runs

WIDE = 120  # columns of a terminal, from which on every number gets a column of its own
COLORS = {"supported": "green", "not supported": "red", "undecided": "yellow"}
WIDE_COLUMNS = ("claim", "verdict", "statement, statistic", "effect [95 %]", "n", "p", "note")
NARROW_COLUMNS = ("claim", "statement, statistic", "effect [95 %]")


def judge(console: Console, options: Claims) -> None:
    """Prints the verdicts on runs, and writes them as claims.md and claims.parquet.

    Raises:
        ValueError: There are no runs, or they cannot be judged together.
        OSError: The table cannot be written; it has been printed by then.
    """
    if not options.runs:
        raise ValueError("Claims need runs: `biasshift claims FOLDER`.")
    table = read_runs(*options.runs)
    verdicts = claims(table)
    print_claims(console, verdicts)
    verdicts.attrs.update(made_by := table_provenance(table, options.runs))
    text = f"{claims_markdown(verdicts)}\n{provenance_sentence(made_by)}\n"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(options.out / "claims.parquet") as temporary:
            verdicts.to_parquet(temporary)
        with replacing(options.out / "claims.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"The table of claims cannot be written into '{options.out}' "
            f"({error.strerror or error}). Choose another --out."
        ) from error
    console.print(f"Claims: {options.out / 'claims.md'} (and Parquet)", soft_wrap=True)


def print_claims(console: Console, verdicts: pd.DataFrame) -> None:
    """Prints one row per claim, and below them the caveats, each once.

    A terminal of less than `WIDE` columns gets the numbers of a claim under each other.

    Args:
        verdicts: The table of `biasshift.claims`.
    """
    console.print(f"\n{VERDICTS_TITLE}", style="bold")
    if not len(verdicts):
        console.print("Nothing: no claim is about runs of these kinds.")
        return
    console.print(VERDICTS_NOTE)
    notes = {caveat: number for number, caveat in enumerate(dict.fromkeys(verdicts["caveat"]), 1)}
    wide = console.width >= WIDE
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=0 if wide else 1)
    for column in WIDE_COLUMNS if wide else NARROW_COLUMNS:
        justify = "right" if column in ("n", "p", "note") else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    rows: Any = verdicts.itertuples()
    for row in rows:
        shown.add_row(*(_wide if wide else _narrow)(row, notes[row.caveat]))
    console.print(shown)
    if "not supported" in set(verdicts["verdict"]):
        console.print("* p of the contrary")
    for caveat, number in notes.items():
        first = f"{number:>3}  "
        note = textwrap.fill(
            printable(caveat),
            console.width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
        )
        console.print(Text(note), soft_wrap=True)
    console.print(f"\n{footnote(verdicts)}")


def _wide(row: Any, note: int) -> tuple[Text, ...]:
    numbers = (Text(text) for text in (_effect(row), str(row.n), _p(row), str(note)))
    return _name(row), _verdict(row), _statement(row), *numbers


def _narrow(row: Any, note: int) -> tuple[Text, ...]:
    name = textwrap.fill(_name(row).plain, 14)  # at its hyphens
    p = f", p = {_p(row)}" if _p(row) else ""
    numbers = "\n".join([_effect(row).replace(" [", "\n["), f"n = {row.n}{p}", f"note {note}"])
    return Text(f"{name}\n").append_text(_verdict(row)), _statement(row), Text(numbers)


def _name(row: Any) -> Text:
    return Text(printable(f"{row.number} {row.claim}"))


def _verdict(row: Any) -> Text:
    return Text(row.verdict, style=COLORS[row.verdict])


def _statement(row: Any) -> Text:
    statement = printable(f"{row.statement} ({row.source})")
    return Text(statement).append(f"\n{printable(row.statistic)}", style="dim")


def _effect(row: Any) -> str:
    return effect(row) if row.n else "not measured"


def _p(row: Any) -> str:
    """The corrected p that decides the verdict."""
    p, contrary = deciding_p(row)
    return f"{p:.2g}{'*' * contrary}" if p == p else ""
