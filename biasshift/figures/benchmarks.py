"""bench: time and memory of unit Fisher matrices, from files of `python -m benchmarks`."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from biasshift import plots
from biasshift.figures.spec import FigureSpec, Number

SHOWN = ("mlp", "cnn")  # the questions in which libraries do the same
MOST_BYTES = 1_000_000


def read_benchmarks(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads benchmarks: one row per question, device and method.

    `seconds`, `bytes` and `repeats` are NaN where a method was skipped.

    Args:
        paths: JSON files of `python -m benchmarks`, or folders of such.

    Raises:
        ValueError: there are none, or a file is not one of these.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(
            f"Benchmarks are missing in {', '.join(map(str, paths))}. Give a folder that `python "
            "-m benchmarks` wrote into."
        )
    return pd.DataFrame([row for file in files for row in _rows(file)])


def _rows(file: Path) -> list[dict[str, Any]]:
    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) else float("nan")

    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("It must not have more than 1 MB.")
        content = json.loads(file.read_text(encoding="utf-8"))
        shared = {
            name: str(content[name])[:200] for name in ("question", "title", "device", "commit")
        }
        return [
            shared
            | {"method": str(row["method"])[:60]}
            | {name: number(row.get(name)) for name in ("seconds", "bytes", "repeats")}
            for row in content["rows"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{file}' is not a file of `python -m benchmarks` ({error!r}). Leave it out."
        ) from error


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the questions in which libraries do the same, on all devices.

    Methods that were skipped are left out.
    """
    rows = table.loc[table["question"].isin(SHOWN) & table["seconds"].notna()]
    plots.need(rows, [], "bench")
    return rows.reset_index(drop=True)


def bench(table: pd.DataFrame) -> plots.Figure:
    """Returns time and extra memory of every method, a row of two panels per question and device.

    The axes begin at 0; the further to the left, the better.
    """
    cases = list(table.groupby(["question", "device"], sort=False))
    figure, axes = plots.panels(2 * len(cases), rows=len(cases), width=3.2, height=2.3)
    for row, ((_, device), rows) in enumerate(cases):
        panels = {"time (s)": rows["seconds"], "extra memory (MiB)": rows["bytes"] / 2**20}
        for ax, (name, values) in zip(axes[2 * row :], panels.items(), strict=False):
            plots.ranking(ax, dict(zip(rows["method"], values, strict=True)))
            ax.set(xlabel=name, xlim=(0, 1.08 * values.max()))
        title = f"{rows['title'].iloc[0].split(',')[0]}; {device}{_repeats(rows)}"
        axes[2 * row].set_title(title, loc="left", parse_math=False)
    plots.headed(
        figure,
        "Every unit's Fisher matrix, medians of interleaved repeats; commit "
        f"{', '.join(table['commit'].unique())}",
    )
    return figure


def numbers(table: pd.DataFrame) -> list[Number]:
    """Returns time and memory of every method, and how many times as long others take as we."""
    listed = []
    for (question, device), rows in table.groupby(["question", "device"], sort=False):
        ours = rows.loc[rows["method"] == "biasshift", "seconds"]
        for row in rows.itertuples():
            facts = [f"{row.seconds:.3g} s"]
            if len(ours) and row.method != "biasshift":
                facts.append(f"{row.seconds / ours.iloc[0]:.1f} × ours")
            facts.append(f"{row.bytes / 2**20:.0f} MiB{_repeats(rows.loc[[row.Index]])}")
            listed.append(Number(f"{question}, {row.method}, {device}", ", ".join(facts)))
    return listed


def _repeats(rows: pd.DataFrame) -> str:
    """ ", n = 7", as far as it is recorded."""
    counts = rows["repeats"].dropna() if "repeats" in rows else ()
    return f", n = {plots.between(counts.astype(int))}" if len(counts) else ""


FIGURES = {
    "bench": FigureSpec(
        title="Time and memory of unit Fisher matrices",
        command="python -m benchmarks",
        paper="no such figure",
        condense=compared,
        panels=bench,
        numbers=numbers,
    )
}
