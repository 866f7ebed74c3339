"""One page for looking at runs: the answer, all claims, layers, units, and where runs come from.

The page is one HTML file. It loads nothing, so it opens from a disk without a network, and it
trusts no text of a run.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from biasshift.atomic import replacing
from biasshift.progress import Progress, Show, progress as shown
from biasshift.report.answer import answer_section
from biasshift.report.claims_section import claims_exports, verdicts_section
from biasshift.report.downsample import chart_data
from biasshift.report.equal_loss import equal_loss_section
from biasshift.report.figure_links import figure_links
from biasshift.report.groups import MAX_GROUPS, RunGroup, run_groups
from biasshift.report.html import escaped
from biasshift.report.judgement import judgements
from biasshift.report.page import html_page
from biasshift.report.sections import (
    first_curves,
    layers_section,
    left_out_section,
    other_curves,
    runs_section,
)
from biasshift.runs.reader import find_runs, read_runs, run_states

__all__ = ["report"]

STEPS = 5  # of a report: reading, charts, losses, claims, the page


def report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    progress: Show = None,
) -> Path:
    """Writes one HTML page about all runs in or below ``runs``, and returns its path.

    Runs that differ only in the seed are averaged. Large inputs are thinned until the page stays
    below 5 MB; its last section lists what was left out.

    Args:
        runs: Run folders, or folders that contain them.
        out: The page, ``*.html``; an earlier one is replaced.
        progress: Whether to show on stderr, or in a notebook, how many steps are done; by default
            in a terminal or a notebook after 3 seconds, and not in loops.

    Raises:
        ValueError: There are no runs, one is damaged, or ``out`` is not the name of a page.
        OSError: The page cannot be written; an earlier one stays as it was.

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
            f"'out' must be a file that ends in .html, got '{out}'. Choose a name such as "
            "report.html."
        )
    with shown("report", progress) as bar:
        return _write(runs, out, bar)


def _write(runs: Sequence[str | os.PathLike[str]], out: Path, bar: Progress) -> Path:
    bar.begin(STEPS, "steps")
    folders, states, table = find_runs(list(runs)), run_states(*runs), read_runs(*runs)
    bar.advance()
    groups = run_groups(states, _last_losses(states, table))
    data = chart_data(table, states, groups)
    bar.advance()
    left_out = data.left_out
    equal_loss = equal_loss_section(table, states, groups, left_out)
    bar.advance()
    judged, why_apart = judgements(table, groups, left_out)
    bar.advance()
    others = other_curves(data)
    answer = answer_section(judged, figure_links(runs, out), first_curves(data))
    sections = [
        ("What these runs say about the paper", answer + _intro(states, groups)),
        ("All claims", verdicts_section(judged, why_apart)),
        *([("More learning curves", others)] if others else []),
        ("Layers and units", layers_section(data)),
        *([("At equal training loss", equal_loss)] if equal_loss else []),
        ("Runs", runs_section(folders, states, left_out)),
        ("What this page leaves out", left_out_section(left_out)),
    ]
    title = f"biasshift: {len(folders)} run{'s' if len(folders) != 1 else ''}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        text = html_page(title, sections, data, claims_exports(judged))
        temporary.write_text(text, encoding="utf-8", newline="\n")
    bar.advance()
    return out


def _last_losses(states: pd.DataFrame, table: pd.DataFrame) -> pd.Series | None:
    """The training loss that each run ended with; of one that failed, NaN."""
    if "train_loss" not in table:
        return None
    network = table.loc[(table["layer"] == "").to_numpy(), ["run", "step", "train_loss"]]
    by_run = network.dropna().sort_values("step", kind="stable").groupby("run", observed=True)
    last = dict(by_run["train_loss"].last())
    ended = zip(states["run"], states["state"], strict=True)
    losses = [last.get(run, math.nan) if state != "failed" else math.nan for run, state in ended]
    return pd.Series(losses, index=states.index, dtype=float)


def _intro(states: pd.DataFrame, groups: Sequence[RunGroup]) -> str:
    counts = ", ".join(
        f"{count} {state}" for state, count in states["state"].value_counts().items()
    )
    labels = "; ".join(group.label for group in groups[:MAX_GROUPS])
    more = f"; and {len(groups) - MAX_GROUPS} more" if len(groups) > MAX_GROUPS else ""
    return (
        f'<p class="faint">{escaped(counts)}. Groups of runs that differ only in the seed: '
        f"{escaped(labels + more, 2000)}.</p>"
    )
