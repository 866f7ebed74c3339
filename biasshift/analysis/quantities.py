"""Runs → one number per run and quantity: at the end, along the run, and at equal loss."""

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd

from biasshift.analysis.formatting import QUANTITIES
from biasshift.analysis.grid import cells_of, mixed_option
from biasshift.fisher.unit_fisher import SAMPLES_PER_INPUT

REFERENCE_DAMPING = 1e-2  # of the examinations at equal loss, the one whose numbers are shown
EXAM_KEYS = ("run", "activation", "seed", "exam_probe", "exam_damping")
NEEDED = ("run", "activation", "seed", "epochs", "epoch", "inputs", "mean", "own", "train_loss")
FEWEST_MEASUREMENTS = 3  # that a variance over epochs is taken of
ENOUGH_UNITS = 0.5  # share of a layer's units that must have them
AT_THE_END = (
    "unit_mean", "unit_mean_abs", "inherited", "train_loss", "drift_units", "drift_median",
)  # fmt: skip
END = 0.9  # of the steps of a run: the scores behind it are its end


def per_run(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run: its seed, cell and learning rate, and its numbers.

    At the end of the run, over all hidden units and all measured steps; NaN for a run that was
    stopped before its last epoch, or whose last loss is not finite:

    * ``unit_mean``: the median over units of their mean activation, the paper's statistic;
      ``unit_mean_abs``: the mean of its absolute value.
    * ``inherited``: the `inherited_share` of the bias shift.
    * ``train_loss``: the `end_loss`.
    * ``drift_units``, ``drift_median``: variances over epochs, see `drifts`.

    Along the run:

    * ``last_step``: how far it got.
    * ``unit_mean_equal``: the median where the run came down to the equal loss, between two
      measurements.
    * ``inherited_early``, ``inherited_equal``: the share over the first quarter of the run, and
      over the steps before the equal loss.

    At equal loss, ``exam_*``: those of `biasshift.experiments.exam.layer_statistics` at damping
    0.01, averaged over two disjoint probes and over the layers that are fed by an activation. NaN
    for a run that never came down to the equal loss.

    Raises:
        ValueError: if the table lacks a column of runs, or holds runs that cannot be compared: of
            two settings, of unequal learning rates, or two of one kind and seed.
    """
    _need(table, NEEDED)
    if mixed := mixed_option(table):
        raise ValueError(
            f"These runs differ in '{mixed[0]}' ({', '.join(map(str, mixed[1]))}). Give runs of "
            "one setting."
        )
    exams = examinations(table)
    exams = exams[exams["exam_damping"] == REFERENCE_DAMPING].drop(
        columns=["activation", "seed", "exam_probe", "exam_damping"]
    )
    runs = cells_of(table).join(exams.groupby("run", observed=True).mean(), on="run")
    equal_steps = runs.set_index("run")["exam_step"]
    rows = [
        {"run": name, **_along(run, float(equal_steps[name]))}
        for name, run in table.groupby("run", observed=True, sort=False)
    ]
    return runs.join(pd.DataFrame(rows).set_index("run"), on="run")


def _need(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in table]:
        raise ValueError(
            f"These runs have no column '{missing[0]}'. Give runs of `biasshift demo` or "
            "`biasshift train`."
        )


def _along(run: pd.DataFrame, equal_step: float) -> dict[str, float]:
    """All numbers of one run that are not of its examination."""
    means = run[(run["unit"] >= 0) & run["mean"].notna()]
    behind = run[run["layer"].isin(fed_layers(run)) & run["own"].notna()]
    numbers = {
        "last_step": float(run["step"].max()),
        "unit_mean_equal": _median_at(means, equal_step),
        "inherited_early": inherited_share(behind[behind["step"] <= run["step"].max() / 4]),
        "inherited_equal": inherited_share(behind[behind["step"] <= equal_step]),
    }
    if not has_ended(run):
        return dict.fromkeys(AT_THE_END, nan) | numbers
    last = _last(means)["mean"].astype(float)
    return {
        "unit_mean": last.median(),
        "unit_mean_abs": last.abs().mean(),
        "inherited": inherited_share(behind),
        "train_loss": end_loss(run),
        **drifts(means),
        **numbers,
    }


def end_loss(run: pd.DataFrame) -> float:
    """Returns the training loss at the end, in nats.

    It is the median of the scores in the last tenth of the run, so that no single minibatch
    decides.
    """
    scores = run[run["train_loss"].notna()]
    return float(scores.loc[scores["step"] > END * scores["step"].max(), "train_loss"].median())


def has_ended(run: pd.DataFrame) -> bool:
    """Tells whether a run got to its last epoch with a finite training loss.

    A run that diverged may continue beside others of an ensemble: reaching the last epoch is not
    enough.
    """
    scores = run[(run["layer"].astype(str) == "") & run["epoch"].notna()]
    return bool(
        run["epoch"].max() >= run["epochs"].iloc[0]
        and np.isfinite(_last(scores)["train_loss"].astype(float)).any()
    )


def _median_at(means: pd.DataFrame, step: float) -> float:
    """The median over units, on a straight line between the measurements around a step."""
    if not len(means) or not step <= means["step"].max():
        return nan
    medians = means.groupby("step")["mean"].median()
    return float(np.interp(step, medians.index, medians.astype(float)))


def drifts(means: pd.DataFrame) -> dict[str, float]:
    """Returns how much mean activations vary over the measurements after step 0.

    ``drift_units`` is the variance of every unit's mean activation, its median over the units;
    ``drift_median`` is the variance of the median over the units. Both are taken layer by layer and
    averaged over layers. NaN with fewer than three measurements.

    Args:
        means: rows of units with ``step``, ``layer``, ``unit`` and ``mean``.
    """
    later = means[means["step"] > 0].astype({"layer": str})
    if later["step"].nunique() < FEWEST_MEASUREMENTS:
        return {"drift_units": nan, "drift_median": nan}
    units = later.groupby(["layer", "unit"])["mean"].var().groupby("layer").median()
    medians = later.groupby(["layer", "step"])["mean"].median().groupby("layer").var()
    return {"drift_units": float(units.mean()), "drift_median": float(medians.mean())}


def examinations(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run, probe and damping with the statistics at equal loss.

    They are means over the layers that are fed by an activation. ``exam_step`` is the step at which
    the run came down to the equal loss, ``exam_excluded`` the share of units that are left out for
    too few effective samples. Without examinations the table has no rows.
    """
    columns = [name for name in QUANTITIES if name.startswith("exam_")]
    if "exam_damping" not in table:
        return pd.DataFrame(columns=[*EXAM_KEYS, *columns]).astype(
            dict.fromkeys(["exam_damping", *columns], "float64")
        )
    rows = table[table["exam_damping"].notna()]
    rows = rows.assign(exam_step=rows["step"].astype(float), exam_excluded=1 - rows["exam_enough"])
    return rows.groupby(list(EXAM_KEYS), observed=True, sort=False)[columns].mean().reset_index()


def fed_layers(run: pd.DataFrame) -> list[str]:
    """Returns the names of the weight layers that are fed by an activation, not by the data.

    They are those behind the first, in the order of the network.

    Raises:
        ValueError: if the runs do not record ``inputs``, by which weight layers are known.
    """
    _need(run, ["inputs"])
    return list(run[run["inputs"].notna()]["layer"].astype(str).drop_duplicates())[1:]


def layer_inputs(runs: pd.DataFrame) -> pd.Series:
    """Returns the number of incoming activations of a unit, by the name of its layer."""
    known = runs[runs["inputs"].notna()]
    return known.assign(layer=known["layer"].astype(str)).groupby("layer")["inputs"].first()


def enough_samples(units: pd.DataFrame, inputs: pd.Series) -> pd.Series:
    """Tells for each row of a unit whether its effective samples can carry a claim.

    Ten per incoming activation are enough: of fewer samples, coupling and gap look larger than they
    are.

    Args:
        units: rows with ``layer`` and ``effective_samples``.
        inputs: as `layer_inputs` returns them.
    """
    layers = units["layer"].astype(str)
    return units["effective_samples"] >= SAMPLES_PER_INPUT * layers.map(inputs).astype(float)


def inherited_share(rows: pd.DataFrame) -> float:
    """Returns the share of the bias shift that units inherit from the layers below.

    ``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows; NaN where nothing
    moved.
    """
    own, incoming, second = (
        float(rows[name].abs().sum()) for name in ("own", "incoming", "second_order")
    )
    total = own + incoming + second
    return incoming / total if total > 0 else nan


def gap_degrees(cosines: pd.Series) -> pd.Series:
    """Returns the angle between gradient and unit natural gradient in degrees.

    Args:
        cosines: between the two; what rounding has moved beyond ±1 is clipped. The angles have
            their dtype.
    """
    return np.degrees(np.arccos(cosines.clip(-1, 1)))


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == rows["step"].max()]
