"""Runs → one page for looking at them: claims, learning curves, layers, units, and where the runs
came from.

The page is one HTML file. It loads nothing, so it opens from a disk without a network, and it
trusts no text of a run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift.atomic import replacing
from biasshift.report.claims_section import verdicts_part
from biasshift.report.downsample import reduced
from biasshift.report.equal_loss import equal_loss_part
from biasshift.report.groups import MOST_SERIES, Series, all_series
from biasshift.report.html import escaped
from biasshift.report.page import page
from biasshift.report.sections import curves_part, layers_part, left_out_part, origins_part
from biasshift.runs.reader import find_runs, read_runs, run_states

if TYPE_CHECKING:
    import pandas as pd


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes one HTML page about all runs in or below `runs`, and returns its path.

    Runs are averaged where they differ in nothing but the seed. Large inputs are thinned until the
    page stays below 5 MB; the page says what was left out.

    Args:
        runs: run folders, or folders that contain them.
        out: the page, ``*.html``; an earlier one is replaced.

    Raises:
        ValueError: no runs there, a damaged run, or `out` is no name of a page.
        OSError: the page cannot be written; an earlier one stays as it was.

    >>> import pandas as pd, tempfile
    >>> from biasshift.runs.writer import Run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Run.create(f"{folder}/elu-0", {"activation": "elu", "seed": 0}) as run:
    ...         run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.3, 2.1]}))
    ...     report([folder], f"{folder}/report.html").name
    'report.html'
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(
            f"'{out}' is no name of a page: choose a file that ends in .html, such as report.html"
        )
    folders, states, table = find_runs(list(runs)), run_states(*runs), read_runs(*runs)
    series = all_series(states, _last_losses(states, table))
    found = reduced(table, states, series)
    origins, not_listed = origins_part(folders, states)
    unjudged: list[str] = []
    examined = equal_loss_part(table, states, series, found.left_out)
    verdicts = verdicts_part(table, series, unjudged)
    sections = [
        ("What these runs say about the paper's claims", verdicts),
        ("Learning curves", curves_part(found)),
        ("Layers and units", layers_part(found)),
        *([("At equal training loss", examined)] if examined else []),
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
    scored = (
        table.loc[(table["layer"] == "").to_numpy(), ["run", "step", "train_loss"]]
        .dropna()
        .sort_values("step", kind="stable")
    )
    last = dict(scored.groupby("run", observed=True)["train_loss"].last())
    ended = zip(states["run"], states["state"], strict=True)
    return pd.Series(
        [last.get(run, math.nan) if state != "failed" else math.nan for run, state in ended],
        index=states.index,
        dtype=float,
    )


def _intro(states: pd.DataFrame, series: Sequence[Series]) -> str:
    counts = ", ".join(
        f"{count} {state}" for state, count in states["state"].value_counts().items()
    )
    groups = "; ".join(one.label for one in series[:MOST_SERIES]) + (
        f"; and {len(series) - MOST_SERIES} more" if len(series) > MOST_SERIES else ""
    )
    return f'<p class="faint">{escaped(counts)}. Groups of runs that differ in the seed alone: {escaped(groups, 2000)}.</p>'


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
