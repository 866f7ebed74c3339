"""Runs → one page for looking at them: claims, learning curves, layers, units, and where the runs came from.

The page is one HTML file. It loads nothing, so it opens from a disk without a network, and it trusts no text of a run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift.claims import claims, sentences
from biasshift.reading import find_runs, read_runs, run_states
from biasshift.report.origins import origins_part
from biasshift.report.page import page
from biasshift.report.parts import claims_part, curves_part, faint, layers_part, left_out_part, reading_part
from biasshift.report.reducing import reduced
from biasshift.report.series import MOST_SERIES, Series, all_series
from biasshift.report.text import escaped
from biasshift.summary import READING, per_run, reading_table
from biasshift.writing import replacing

if TYPE_CHECKING:
    import pandas as pd

MOST_SETTINGS = 6  # of which each gets its own table of claims


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes one HTML page about all runs in or below `runs`, and returns its path.

    Runs are averaged where they differ in nothing but the seed. Large inputs are thinned until the page stays below 5 MB; the page
    says what was left out.

    Args:
        runs: run folders, or folders that contain them.
        out: the page, ``*.html``; an earlier one is replaced.

    Raises:
        ValueError: no runs there, a damaged run, or `out` is no name of a page.
        OSError: the page cannot be written; an earlier one stays as it was.

    >>> import pandas as pd, tempfile
    >>> from biasshift.recording import Run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Run.create(f"{folder}/elu-0", {"activation": "elu", "seed": 0}) as run:
    ...         run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.3, 2.1]}))
    ...     report([folder], f"{folder}/report.html").name
    'report.html'
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"'{out}' is no name of a page: choose a file that ends in .html, such as report.html")
    folders, states, table = find_runs(list(runs)), run_states(*runs), read_runs(*runs)
    series = all_series(states, _last_losses(states, table))
    found = reduced(table, states, series)
    origins, not_listed = origins_part(folders, states)
    unjudged: list[str] = []
    verdicts = _verdicts(table, series, unjudged)
    sections = [
        ("What these runs say about the paper's claims", verdicts),
        ("Learning curves", curves_part(found)),
        ("Layers and units", layers_part(found)),
        ("Runs", origins),
        ("What this page leaves out", left_out_part([*found.left_out, *unjudged, *not_listed])),
    ]
    title = f"biasshift: {len(folders)} run{'s' if len(folders) != 1 else ''}"
    _write(out, page(title, _intro(states, series), sections, found))
    return out


def _last_losses(states: pd.DataFrame, table: pd.DataFrame) -> pd.Series | None:
    """The training loss that each run ended with; of one that failed, NaN."""
    import pandas as pd

    if "train_loss" not in table:
        return None
    scored = table.loc[(table["layer"] == "").to_numpy(), ["run", "step", "train_loss"]].dropna().sort_values("step", kind="stable")
    last = dict(scored.groupby("run", observed=True)["train_loss"].last())
    ended = zip(states["run"], states["state"], strict=True)
    return pd.Series([last.get(run, math.nan) if state != "failed" else math.nan for run, state in ended], index=states.index, dtype=float)


def _intro(states: pd.DataFrame, series: Sequence[Series]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in states["state"].value_counts().items())
    groups = "; ".join(one.label for one in series[:MOST_SERIES]) + (
        f"; and {len(series) - MOST_SERIES} more" if len(series) > MOST_SERIES else ""
    )
    return f'<p class="faint">{escaped(counts)}. Groups of runs that differ in the seed alone: {escaped(groups, 2000)}.</p>'


def _verdicts(table: pd.DataFrame, series: Sequence[Series], left_out: list[str]) -> str:
    """Claims and the table for reading, for all runs; where they are of several settings, for each setting by itself."""
    try:
        return _said(table)
    except ValueError as error:
        whole = str(error)
    settings = list(dict.fromkeys(one.setting for one in series))
    parts, reasons = [], {whole}
    for setting in settings[:MOST_SETTINGS] if len(settings) > 1 else []:
        runs = [run for one in series if one.setting == setting for run in one.runs]
        try:
            said = _said(table.loc[table["run"].isin(runs)])
        except ValueError as error:
            reasons.add(str(error))
            said = faint(f"No verdicts. {error}")
        parts.append(f"<h3>{escaped(setting or 'all other runs', 200)}</h3>{said}")
    if not parts or (reasons == {whole} and all("No verdicts" in part for part in parts)):
        return faint(f"No verdicts. {whole}")
    if len(settings) > MOST_SETTINGS:
        left_out.append(f"Claims of {len(settings) - MOST_SETTINGS} of {len(settings)} settings: give fewer runs at a time.")
    return faint(f"{whole} So here each setting stands by itself.") + "".join(parts)


def _said(table: pd.DataFrame) -> str:
    try:
        found = claims(table)
        summary = "<h3>Mean ± SD over seeds</h3>" + reading_part(reading_table(per_run(table)), READING)
    except (TypeError, LookupError) as error:  # options of other kinds than any run of ours has must not take the charts away
        raise ValueError(f"These runs' options are not of the kinds that claims are made of ({error}).") from error
    return claims_part(found, sentences(found)) + summary


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
