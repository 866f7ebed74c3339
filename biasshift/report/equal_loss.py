"""The examinations at equal training loss: they stand at no step of a chart, so here they are in
numbers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from biasshift.analysis.formatting import QUANTITIES, mean_and_sd
from biasshift.analysis.per_run import REFERENCE_DAMPING
from biasshift.report.downsample import LARGEST, by_depth, even
from biasshift.report.groups import MOST_SERIES, Series
from biasshift.report.html import escaped, faint, folded, listed, number, plain, table, told_apart

if TYPE_CHECKING:
    import pandas as pd

MOST_LAYERS, MOST_QUANTITIES = 32, 20
_PLAIN = (1e-2, 1e6)  # sizes that need no powers of ten
_KEYS = ("exam_probe", "exam_damping")
_NAMES = QUANTITIES | {
    "exam_enough": "units with enough effective samples (share)",
    "exam_mean_in_abs": "|mean incoming activation|, mean",
    "exam_loss": "training loss",
}
_ALL = "all layers"
_FIRST = QUANTITIES["exam_gap_degrees"]  # open from the beginning


def equal_loss_part(
    runs: pd.DataFrame, options: Container[str], series: Sequence[Series], left_out: list[str]
) -> str:
    """One table per quantity: a row per layer, a column per series, mean ± SD over runs. Empty
    where nothing was examined.

    Args:
        options: columns that are no quantities.
        left_out: what is not in the tables is added to it.
    """
    import pandas as pd

    rows: Any = runs[runs["exam_damping"].notna()] if "exam_damping" in runs else runs[:0]
    if not len(rows):
        return ""
    there = set(rows["run"].astype(str).unique())
    examined = sorted(
        (one for one in series if there & set(one.runs)), key=lambda one: not one.shown
    )
    if len(examined) > MOST_SERIES:
        left_out.append(
            "Examinations at equal training loss of "
            f"{listed(one.label for one in examined[MOST_SERIES:])}."
        )
    labels = {run: one.label for one in examined[:MOST_SERIES] for run in one.runs}
    rows = rows[rows["run"].isin(labels)]
    damping = _damping(rows, left_out)
    rows = rows[rows["exam_damping"] == damping].assign(exam_step=rows["step"])
    names = [
        name
        for name in rows
        if str(name).startswith("exam_") and name not in _KEYS and name not in options
    ]
    names = [
        name
        for name in names
        if pd.api.types.is_numeric_dtype(rows[name]) and rows[name].notna().any()
    ]
    if len(names) > MOST_QUANTITIES:
        left_out.append(
            f"At equal training loss, {len(names) - MOST_QUANTITIES} quantities: "
            f"{listed(names[MOST_QUANTITIES:])}."
        )
        names = names[:MOST_QUANTITIES]
    values: Any = rows[names].astype(float)
    each: Any = (
        values.where(values.abs() < LARGEST)
        .groupby([rows["run"].astype(str), rows["layer"].astype(str)])
        .mean()
    )
    layers = by_depth(list(dict.fromkeys(each.index.get_level_values("layer"))))
    if len(layers) > MOST_LAYERS:
        left_out.append(
            f"At equal training loss, {MOST_LAYERS} of {len(layers)} layers are shown, evenly "
            "chosen."
        )
    titles = told_apart(
        [
            plain(_NAMES.get(name, name.removeprefix("exam_").replace("_", " ")), 60)
            for name in names
        ]
    )
    parts = [
        _quantity(title, each[name], even(layers, MOST_LAYERS), labels)
        for name, title in zip(names, titles, strict=True)
    ]
    note = f"Where each run first came down to the training loss that all are compared at; damping {damping:g}, mean over the probes, "
    note += "then mean ± SD over runs. "
    note += "Effective samples and incoming activations are of all units, the others of those with enough effective samples."
    return faint(note) + "".join(parts)


def _damping(rows: Any, left_out: list[str]) -> float:
    """The damping whose numbers are shown: the one of `biasshift.analysis.per_run`, where it was
    tried.
    """
    dampings = sorted(float(one) for one in rows["exam_damping"].unique())
    chosen = REFERENCE_DAMPING if REFERENCE_DAMPING in dampings else dampings[len(dampings) // 2]
    if others := [f"{one:g}" for one in dampings if one != chosen]:
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


def _quantity(title: str, values: Any, layers: Sequence[str], labels: Mapping[str, str]) -> str:
    """A table of one quantity; of a single row, where it is the same in all layers of a run."""
    by_run: Any = values.groupby(level="run")
    by_layer: Any = (
        values.unstack("layer")[list(layers)]
        if (by_run.nunique(dropna=False) > 1).any()
        else by_run.first().to_frame(_ALL)
    )
    columns: dict[str, list[str]] = {}
    for run, label in labels.items():
        if run in by_layer.index:
            columns.setdefault(label, []).append(run)
    rows = [
        [
            ("", escaped(layer, 60)),
            *(("number", _mean_and_sd(by_layer.loc[some, layer])) for some in columns.values()),
        ]
        for layer in by_layer
    ]
    return folded(escaped(title), table(["layer", *columns], rows), opened=title == _FIRST)


def _mean_and_sd(values: Any) -> str:
    size = values.abs().mean()
    if not len(values.dropna()) or size == 0 or _PLAIN[0] <= size < _PLAIN[1]:
        return escaped(mean_and_sd(values).replace("-", "−"))
    sd = f" ± {number(values.std(), 2)}" if values.count() > 1 else ""
    return escaped(
        number(values.mean())
        + sd
        + (f" (n = {values.count()})" if values.count() < len(values) else "")
    )
