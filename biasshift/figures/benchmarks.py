"""bench: time and memory of unit Fisher matrices, against other libraries. Of the files that
`python -m benchmarks` writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift import plots
from biasshift.figures.spec import Drawing, Number

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

SHOWN = ("mlp", "cnn")
MOST_BYTES = 1_000_000


def read_benchmarks(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """One row per question, device and method, from the JSON files in `paths`.

    Raises:
        ValueError: there are none, or a file is none of those that `python -m benchmarks` writes.
    """
    import pandas as pd

    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(
            f"no benchmarks in {', '.join(map(str, paths))}: give a folder that `python -m "
            "benchmarks` wrote into"
        )
    return pd.DataFrame([row for file in files for row in _rows(file)])


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = {name: str(found[name])[:200] for name in ("question", "title", "device", "commit")}
        return [
            whole
            | {"method": str(row["method"])[:60]}
            | {name: _number(row.get(name)) for name in ("seconds", "bytes", "repeats")}
            for row in found["rows"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{file}' is no file of `python -m benchmarks` ({error!r}): leave it out"
        ) from error


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Those questions in which libraries do the same; of devices, all."""
    found = table.loc[table["question"].isin(SHOWN) & table["seconds"].notna()]
    plots.need(found, [], "bench")
    return found.reset_index(drop=True)


def bench(table: pd.DataFrame) -> Figure:
    """Time and extra memory of every method, from 0; a method is further to the left the better it
    is.
    """
    cases = list(table.groupby(["question", "device"], sort=False))
    figure, axes = plots.panels(2 * len(cases), rows=len(cases), width=3.2, height=2.3)
    for row, ((_, device), rows) in enumerate(cases):
        for ax, (values, name) in zip(
            axes[2 * row :],
            ((rows["seconds"], "time (s)"), (rows["bytes"] / 2**20, "extra memory (MiB)")),
            strict=False,
        ):
            plots.ranking(ax, dict(zip(rows["method"], values, strict=True)))
            ax.set_xlabel(name)
            ax.set_xlim(0, 1.08 * values.max())
        title = f"{rows['title'].iloc[0].split(',')[0]}; {device}{_repeats(rows)}"
        axes[2 * row].set_title(title, loc="left", parse_math=False)
    plots.headed(
        figure,
        "Every unit's Fisher matrix, medians of interleaved repeats; commit "
        f"{', '.join(table['commit'].unique())}",
    )
    return figure


def numbers(table: pd.DataFrame) -> list[Number]:
    """How many times as long others take."""
    listed = []
    for (question, device), rows in table.groupby(["question", "device"], sort=False):
        ours = rows.loc[rows["method"] == "biasshift", "seconds"]
        for row in rows.itertuples():
            times = (
                f", {row.seconds / ours.iloc[0]:.1f} × ours"
                if len(ours) and row.method != "biasshift"
                else ""
            )
            here = f"{row.seconds:.3g} s{times}, {row.bytes / 2**20:.0f} MiB{_repeats(rows.loc[[row.Index]])}"
            listed.append(Number(f"{question}, {row.method}, {device}", here))
    return listed


def _repeats(rows: pd.DataFrame) -> str:
    """ ", n = 7", as far as it is recorded."""
    found = rows["repeats"].dropna() if "repeats" in rows else []
    return f", n = {plots.between(found.astype(int))}" if len(found) else ""


FIGURES = {
    "bench": Drawing(
        "Time and memory of unit Fisher matrices",
        "python -m benchmarks",
        "no such figure",
        compared,
        bench,
        numbers,
    )
}
