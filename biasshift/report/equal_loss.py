"""The section about examinations at equal training loss.

They stand at no step of a chart, so here are their numbers, in one table for each quantity.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import pandas as pd

from biasshift.analysis.formatting import QUANTITIES, mean_and_sd
from biasshift.analysis.quantities import REFERENCE_DAMPING
from biasshift.report.downsample import LARGEST, by_depth, evenly_spaced, first
from biasshift.report.groups import MAX_GROUPS, RunGroup
from biasshift.report.html import details, distinct, escaped, listed, note, number, plain, table

MAX_LAYERS, MAX_QUANTITIES = 32, 20
_PLAIN = (1e-2, 1e6)  # sizes that need no powers of ten
_KEYS = ("exam_probe", "exam_damping")
_NAMES = QUANTITIES | {
    "exam_enough": "units with enough effective samples (share)",
    "exam_mean_in_abs": "|mean incoming activation|, mean",
    "exam_loss": "training loss",
}
_OPENED = QUANTITIES["exam_gap_degrees"]  # the table that is open from the beginning


def equal_loss_section(
    runs: pd.DataFrame, options: Container[str], groups: Sequence[RunGroup], left_out: list[str]
) -> str:
    """Returns one table per quantity: a row per layer, a column per group, mean ± SD over runs.

    The numbers are those at one damping, averaged over the probes. Where nothing was examined there
    is no section, and the text is empty.

    Args:
        runs: The rows of `biasshift.runs.reader.read_runs`.
        options: The columns that are no quantities.
        groups: The groups of runs; those that the charts show come first.
        left_out: Gets a sentence about everything that is not in the tables.
    """
    rows: Any = runs[runs["exam_damping"].notna()] if "exam_damping" in runs else runs[:0]
    if not len(rows):
        return ""
    measured = set(rows["run"].astype(str).unique())
    examined = [group for group in groups if measured & set(group.runs)]
    examined.sort(key=lambda group: not group.shown)
    kind = "groups of runs that were examined at equal training loss"
    columns = first([group.label for group in examined], MAX_GROUPS, kind, left_out)
    labels = {run: group.label for group in examined[: len(columns)] for run in group.runs}
    rows = rows[rows["run"].isin(labels)]
    damping = _damping(rows, left_out)
    rows = rows[rows["exam_damping"] == damping].assign(exam_step=rows["step"])
    names = [
        name
        for name in rows
        if str(name).startswith("exam_")
        and not (name in _KEYS or name in options)
        and pd.api.types.is_numeric_dtype(rows[name])
        and rows[name].notna().any()
    ]
    names = first(names, MAX_QUANTITIES, "quantities at equal training loss", left_out)
    values: Any = rows[names].astype(float)
    by = [rows["run"].astype(str), rows["layer"].astype(str)]
    means: Any = values.where(values.abs() < LARGEST).groupby(by).mean()
    layers = by_depth(list(dict.fromkeys(means.index.get_level_values("layer"))))
    if len(layers) > MAX_LAYERS:
        left_out.append(
            f"At equal training loss, {MAX_LAYERS} of {len(layers)} layers are shown, evenly "
            "chosen."
        )
        layers = evenly_spaced(layers, MAX_LAYERS)
    unnamed = {name: name.removeprefix("exam_").replace("_", " ") for name in names}
    titles = distinct([plain(_NAMES.get(name, unnamed[name]), 60) for name in names])
    how = note(
        "Where each run first came down to the training loss at which all are compared; damping "
        f"{damping:g}, mean over the probes, then mean ± SD over runs. Effective samples and "
        "incoming activations are of all units, the others of those with enough effective samples."
    )
    return how + "".join(
        _quantity_table(title, means[name], layers, labels)
        for name, title in zip(names, titles, strict=True)
    )


def _damping(rows: Any, left_out: list[str]) -> float:
    """The damping whose numbers are shown: `REFERENCE_DAMPING` where it was tried, or else the
    median.
    """
    dampings = sorted(float(value) for value in rows["exam_damping"].unique())
    chosen = REFERENCE_DAMPING if REFERENCE_DAMPING in dampings else dampings[len(dampings) // 2]
    if others := [f"{value:g}" for value in dampings if value != chosen]:
        left_out.append(
            f"Examinations at equal training loss with the dampings {listed(others)}: their table "
            f"is of {chosen:g}."
        )
    if "exam_probe" in rows and (probes := rows["exam_probe"].nunique()) > 1:
        left_out.append(
            f"The {probes} probes of these examinations one by one: their table has the mean over "
            "them."
        )
    return chosen


def _quantity_table(
    title: str, values: Any, layers: Sequence[str], labels: Mapping[str, str]
) -> str:
    """A table of one quantity; of a single row, where it is the same in all layers of a run."""
    by_run: Any = values.groupby(level="run")
    by_layer: Any = (
        values.unstack("layer")[list(layers)]
        if (by_run.nunique(dropna=False) > 1).any()
        else by_run.first().to_frame("all layers")
    )
    columns: dict[str, list[str]] = {}
    for run, label in labels.items():
        if run in by_layer.index:
            columns.setdefault(label, []).append(run)
    rows = [
        [
            ("", escaped(layer, 60)),
            *(("number", _mean_and_sd(by_layer.loc[runs, layer])) for runs in columns.values()),
        ]
        for layer in by_layer
    ]
    return details(escaped(title), table(["layer", *columns], rows), opened=title == _OPENED)


def _mean_and_sd(values: Any) -> str:
    size = values.abs().mean()
    if not len(values.dropna()) or size == 0 or _PLAIN[0] <= size < _PLAIN[1]:
        return escaped(mean_and_sd(values).replace("-", "−"))
    sd = f" ± {number(values.std(), 2)}" if values.count() > 1 else ""
    some = f" (n = {values.count()})" if values.count() < len(values) else ""
    return escaped(number(values.mean()) + sd + some)
