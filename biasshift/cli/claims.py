"""`biasshift claims`: the verdicts on runs as a table with its caveats, on the terminal and as
files.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from biasshift.analysis.formatting import claims_markdown, deciding_p, effect, footnote
from biasshift.analysis.verdicts import claims
from biasshift.atomic import replacing
from biasshift.cli.commands import Claims
from biasshift.cli.console import HOW_JUDGED, JUDGED, printable
from biasshift.runs.provenance import origin, origin_said
from biasshift.runs.reader import read_runs

if TYPE_CHECKING:
    import pandas as pd

WIDE = 120  # columns of a terminal, from which on every number gets a column of its own
COLORS = {"supported": "green", "not supported": "red", "undecided": "yellow"}
CONTRARY = "* p of the contrary"
COLUMNS = {  # of a wide terminal, and of a narrow one
    True: ("claim", "verdict", "statement, statistic", "effect [95 %]", "n", "p", "note"),
    False: ("claim", "statement, statistic", "effect [95 %]"),
}


def judge(console: Console, options: Claims) -> None:
    """Says what the runs say about the claims, and writes it down.

    Raises:
        ValueError: there are no runs, or none that can be judged together.
        OSError: the table cannot be written; it has been printed by then.
    """
    if not options.runs:
        raise ValueError("claims are about runs: biasshift claims FOLDER.")
    table = read_runs(*options.runs)
    found = claims(table)
    say_claims(console, found)
    found.attrs.update(made_by := origin(table, options.runs))
    try:
        _write(found, f"{claims_markdown(found)}\n{origin_said(made_by)}\n", options.out)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"the table of claims cannot be written into '{options.out}' ({reason}): choose "
            "another --out."
        ) from error
    console.print(f"Claims: {options.out / 'claims.md'} (and Parquet)", soft_wrap=True)


def _write(found: "pd.DataFrame", words: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "claims.parquet") as temporary:
        found.to_parquet(temporary)
    with replacing(out / "claims.md") as temporary:
        temporary.write_text(words, encoding="utf-8")


def say_claims(console: Console, found: "pd.DataFrame") -> None:
    """One row per claim, and below the caveats, each said once; a narrow terminal gets the numbers
    of a claim under each other.
    """
    console.print(f"\n{JUDGED}", style="bold")
    if not len(found):
        console.print("Nothing: no claim is about runs of these kinds.")
        return
    console.print(HOW_JUDGED)
    notes = {caveat: number for number, caveat in enumerate(dict.fromkeys(found["caveat"]), 1)}
    wide = console.width >= WIDE
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=0 if wide else 1)
    for column in COLUMNS[wide]:
        shown.add_column(
            column, justify="right" if column in ("n", "p", "note") else "left", overflow="fold"
        )
    rows: list[Any] = list(found.itertuples())
    for row in rows:
        shown.add_row(*(_wide if wide else _narrow)(row, notes[row.caveat]))
    console.print(shown)
    if "not supported" in set(found["verdict"]):
        console.print(CONTRARY)
    for caveat, number in notes.items():
        first = f"{number:>3}  "
        note = textwrap.fill(
            printable(caveat),
            console.width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
        )
        console.print(Text(note), soft_wrap=True)
    console.print(f"\n{footnote(found)}")


def _wide(row: Any, note: int) -> tuple[Text, ...]:
    return (
        _name(row),
        _verdict(row),
        _statement(row),
        Text(_effect(row)),
        Text(str(row.n)),
        Text(_p(row)),
        Text(str(note)),
    )


def _narrow(row: Any, note: int) -> tuple[Text, ...]:
    name = textwrap.fill(_name(row).plain, 14)  # at its hyphens
    p = f", p = {_p(row)}" if _p(row) else ""
    numbers = [*_effect(row).replace(" [", "\n[").split("\n"), f"n = {row.n}{p}", f"note {note}"]
    return Text(f"{name}\n").append_text(_verdict(row)), _statement(row), Text("\n".join(numbers))


def _name(row: Any) -> Text:
    return Text(printable(f"{row.number} {row.claim}"))


def _verdict(row: Any) -> Text:
    return Text(row.verdict, style=COLORS[row.verdict])


def _statement(row: Any) -> Text:
    return Text(printable(f"{row.statement} ({row.source})")).append(
        f"\n{printable(row.statistic)}", style="dim"
    )


def _effect(row: Any) -> str:
    return effect(row) if row.n else "not measured"


def _p(row: Any) -> str:
    """The corrected p that the verdict goes by."""
    p, contrary = deciding_p(row)
    return f"{p:.2g}{'*' * contrary}" if p == p else ""
