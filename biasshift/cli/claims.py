"""The command ``biasshift claims``: verdicts with their caveats, on the terminal and as files."""

import textwrap
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from biasshift.analysis.evidence import read_evidence
from biasshift.analysis.formatting import VERDICTS, claims_markdown, deciding_p, effect, footnote
from biasshift.analysis.verdicts import claims
from biasshift.atomic import replacing
from biasshift.cli.commands import Claims
from biasshift.cli.console import print_json, print_wrapped, watched
from biasshift.cli.results import VERDICTS_NOTE, VERDICTS_TITLE
from biasshift.escapes import visible
from biasshift.runs.provenance import provenance_sentence, table_provenance

WIDE = 120  # columns of a terminal, from which on every number gets a column of its own
COLORS = {"supported": "green", "not supported": "red", "undecided": "yellow"}
WIDE_COLUMNS = ("claim", "verdict", "statement, statistic", "effect [95 %]", "n", "p", "note")
NARROW_COLUMNS = ("claim", "statement, statistic", "effect [95 %]")


def judge(console: Console, options: Claims) -> None:
    """Prints the verdicts on runs, and writes them as claims.md and claims.parquet; or prints JSON.

    Raises:
        ValueError: There are no runs, or they cannot be judged together.
        OSError: The table cannot be written; it has been printed by then.
    """
    table = read_evidence(*options.runs)
    with watched(console, "claims") as bar:
        verdicts = claims(table, progress=bar)
    if options.json:
        print_json(console, verdicts)
        return
    print_claims(console, verdicts)
    verdicts.attrs.update(made_by := table_provenance(table, options.runs))
    text = f"{claims_markdown(verdicts)}\n{provenance_sentence(made_by)}\n"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        # By an open file: to pyarrow, names are UTF-8.
        with replacing(options.out / "claims.parquet") as temporary, open(temporary, "wb") as file:
            verdicts.to_parquet(file)
        with replacing(options.out / "claims.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"The table of claims cannot be written into '{options.out}' "
            f"({error.strerror or error}). Choose another --out."
        ) from error
    written = visible(str(options.out / "claims.md"))
    console.print(f"Claims: {written} (and Parquet)", soft_wrap=True)


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
    measured = verdicts[verdicts["n"] > 0]
    notes = {caveat: number for number, caveat in enumerate(dict.fromkeys(measured["caveat"]), 1)}
    wide = console.width >= WIDE
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=0 if wide else 1)
    for column in WIDE_COLUMNS if wide else NARROW_COLUMNS:
        justify = "right" if column in ("n", "p", "note") else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    rows: Any = measured.itertuples()
    for row in rows:
        shown.add_row(*_cells(row, notes[row.caveat], wide))
    console.print(shown)
    if "not supported" in set(measured["verdict"]):
        console.print("* p of the contrary")
    for caveat, number in notes.items():
        print_wrapped(console, caveat, indent=f"{number:>3}  ", hanging=" " * 5)
    if missing := verdicts.loc[verdicts["n"] == 0, "claim"].tolist():
        print_wrapped(console, f"Not measured by these runs: {', '.join(missing)}.", "", "  ")
    console.print(f"\n{footnote(verdicts)}")


def _cells(row: Any, note: int, wide: bool) -> tuple[Text, ...]:
    value, contrary = deciding_p(row)
    p = f"{value:.2g}{'*' * contrary}" if value == value else ""
    size = effect(row)
    name = visible(f"{row.number} {row.claim}")
    verdict = Text(VERDICTS[row.verdict].lower(), style=COLORS[row.verdict])
    statement = Text(visible(f"{row.statement} ({row.source})"))
    statement.append(f"\n{visible(row.statistic)}", style="dim")
    if wide:
        return Text(name), verdict, statement, *map(Text, (size, str(row.n), p, str(note)))
    lines = [size.replace(" [", "\n["), f"n = {row.n}" + f", p = {p}" * bool(p), f"note {note}"]
    name = Text(f"{textwrap.fill(name, 14)}\n")  # broken at its hyphens
    return name.append_text(verdict), statement, Text("\n".join(lines))
