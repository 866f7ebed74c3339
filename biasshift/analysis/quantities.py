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
SHIFT = ("own", "incoming", "second_order")  # the parts of the bias shift of an update
NEEDED = ("run", "activation", "seed", "epochs", "epoch", "inputs", "mean", "own", "train_loss")
# Columns that this module reads, besides the options of the runs.
NUMBERS_READ = {
    *NEEDED, *SHIFT, *EXAM_KEYS, "step", "layer", "unit", "exam_enough",
    *(name for name in QUANTITIES if name.startswith("exam_")),
}  # fmt: skip
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
    numbers = _numbers(table, runs.set_index("run")["exam_step"].astype(float))
    return runs.join(numbers.reindex(runs["run"].astype(str)).reset_index(drop=True))


def _need(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in table]:
        raise ValueError(
            f"These runs have no column '{missing[0]}'. Give runs of `biasshift demo` or "
            "`biasshift train`."
        )


def _numbers(table: pd.DataFrame, equal_steps: pd.Series) -> pd.DataFrame:
    """All numbers of the runs that are not of their examinations, by run.

    Every step takes the rows of all runs together: of hundreds of runs, a loop would take minutes.
    """
    means = table.loc[
        (table["unit"] >= 0).to_numpy() & table["mean"].notna().to_numpy(),
        ["run", "step", "layer", "unit", "mean"],
    ]
    behind = table.loc[
        _behind_the_first(table) & table["own"].notna().to_numpy(), ["run", "step", *SHIFT]
    ]
    last_step = table.groupby("run", observed=True)["step"].max().astype(float)
    last_means = _last(means).astype({"mean": float})
    units = last_means.groupby("run", observed=True)["mean"]
    at_the_end = {
        "unit_mean": units.median(),
        "unit_mean_abs": last_means.assign(mean=last_means["mean"].abs())
        .groupby("run", observed=True)["mean"]
        .mean(),
        "inherited": inherited_shares(behind),
        "train_loss": end_losses(table),
        **drifts(means),
    }
    steps = behind["step"].to_numpy(float)
    along = {
        "last_step": last_step,
        "unit_mean_equal": _medians_at(means, equal_steps),
        "inherited_early": inherited_shares(behind[steps <= _of(behind, last_step) / 4]),
        "inherited_equal": inherited_shares(behind[steps <= _of(behind, equal_steps)]),
    }
    columns = at_the_end | along | {"ended": have_ended(table)}
    numbers = pd.DataFrame({name: values.rename(index=str) for name, values in columns.items()})
    ended = numbers.pop("ended").astype(bool)
    numbers.loc[~ended, list(AT_THE_END)] = nan
    return numbers


def _of(rows: pd.DataFrame, by_run: pd.Series) -> np.ndarray:
    """The number of its run for every row."""
    return rows["run"].map(dict(by_run)).to_numpy(float)


def _behind_the_first(table: pd.DataFrame) -> np.ndarray:
    """Whether a row is of a weight layer that is fed by an activation; see `fed_layers`."""
    _need(table, ["inputs"])
    runs, layers = (pd.factorize(table[name])[0] for name in ("run", "layer"))
    pairs = runs * (layers.max(initial=0) + 1) + layers
    weights = pd.unique(pairs[table["inputs"].notna().to_numpy()])
    fed = weights[pd.Series(weights // (layers.max(initial=0) + 1)).duplicated()]
    return np.isin(pairs, fed)


def end_losses(table: pd.DataFrame) -> pd.Series:
    """Returns the training loss of every run at its end, in nats.

    It is the median of the scores in the last tenth of the run, so that no single minibatch
    decides.

    Args:
        table: rows with ``run``, ``step`` and ``train_loss``.
    """
    scores = table.loc[table["train_loss"].notna().to_numpy(), ["run", "step", "train_loss"]]
    last = scores.groupby("run", observed=True)["step"].transform("max")
    late = scores[(scores["step"] > END * last).to_numpy()]
    return late.groupby("run", observed=True)["train_loss"].median().astype(float)


def have_ended(table: pd.DataFrame) -> pd.Series:
    """Tells for every run whether it got to its last epoch with a finite training loss.

    A run that diverged may continue beside others of an ensemble: reaching the last epoch is not
    enough.

    Args:
        table: rows with ``run``, ``step``, ``layer``, ``epoch``, ``epochs`` and ``train_loss``.
    """
    by_run = table.groupby("run", observed=True)
    arrived = by_run["epoch"].max() >= by_run["epochs"].first()
    network = (table["layer"] == "").to_numpy() & table["epoch"].notna().to_numpy()
    last = _last(table.loc[network, ["run", "step", "train_loss"]])
    finite = last.loc[np.isfinite(last["train_loss"].to_numpy(float)), "run"]
    return arrived & arrived.index.isin(finite.unique())


def _medians_at(means: pd.DataFrame, steps: pd.Series) -> pd.Series:
    """The median over the units of every run, on a straight line between the measurements around
    a step; without those that did not get there.
    """
    medians = means.groupby(["run", "step"], observed=True)["mean"].median().astype(float)
    found = {}
    for run, of_run in medians.groupby(level="run", observed=True):
        at = of_run.index.get_level_values("step").to_numpy(float)
        if steps[run] <= at.max():
            found[run] = float(np.interp(steps[run], at, of_run))
    return pd.Series(found, dtype=float)


def drifts(means: pd.DataFrame) -> dict[str, pd.Series]:
    """Returns how much mean activations vary over the measurements after step 0, by run.

    ``drift_units`` is the variance of every unit's mean activation, its median over the units;
    ``drift_median`` is the variance of the median over the units. Both are taken layer by layer and
    averaged over layers. NaN with fewer than three measurements.

    Args:
        means: rows of units with ``run``, ``step``, ``layer``, ``unit`` and ``mean``.
    """
    later = means[(means["step"] > 0).to_numpy()]
    enough = later.groupby("run", observed=True)["step"].nunique() >= FEWEST_MEASUREMENTS
    layer = ["run", "layer"]
    units = later.groupby([*layer, "unit"], observed=True)["mean"].var()
    medians = later.groupby([*layer, "step"], observed=True)["mean"].median()
    by_layer = {
        "drift_units": units.groupby(level=layer, observed=True).median(),
        "drift_median": medians.groupby(level=layer, observed=True).var(),
    }
    return {
        name: values.groupby(level="run", observed=True).mean().astype(float).where(enough)
        for name, values in by_layer.items()
    }


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


def inherited_shares(rows: pd.DataFrame) -> pd.Series:
    """Returns the share of the bias shift that units inherit from the layers below, by run.

    ``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows of each run; NaN
    where nothing moved.

    Args:
        rows: with ``run``, ``own``, ``incoming`` and ``second_order``.
    """
    sums = rows[list(SHIFT)].abs().astype(float).groupby(rows["run"], observed=True).sum()
    total = sums.sum(axis=1)
    return (sums["incoming"] / total).where(total > 0)


def gap_degrees(cosines: pd.Series) -> pd.Series:
    """Returns the angle between gradient and unit natural gradient in degrees.

    Args:
        cosines: between the two; what rounding has moved beyond ±1 is clipped. The angles have
            their dtype.
    """
    return np.degrees(np.arccos(cosines.clip(-1, 1)))


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the last step of each run that is among them."""
    last = rows.groupby("run", observed=True)["step"].transform("max")
    return rows[(rows["step"] == last).to_numpy()]
