"""Runs → one number per run and quantity, and the table for reading: mean ± SD over seeds for every
activation function.
"""

from typing import TYPE_CHECKING

from biasshift.analysis.formatting import QUANTITIES
from biasshift.analysis.grid import cells_of

if TYPE_CHECKING:
    import pandas as pd

REFERENCE_DAMPING = 1e-2  # of the examinations at equal loss, the one whose numbers are shown
EXAM_KEYS = ("run", "activation", "seed", "exam_probe", "exam_damping")
REMEDY = "give runs of `biasshift demo` or `biasshift train`"
NEEDED = ("run", "activation", "seed", "epochs", "epoch", "inputs", "mean", "own", "train_loss")
FEWEST_MEASUREMENTS = 3  # that a variance over epochs is taken of
# effective samples per incoming activation, below which a unit's coupling and gap say little
SAMPLES_PER_INPUT = 10
END = 0.9  # of the steps of a run: the scores behind it are its end
ENOUGH_UNITS = 0.5  # share of a layer's units that must have them


# What runs that are compared must share, where they record it; so they must the options of the
# updates, named update_….
SHARED = (
    "experiment", "dataset", "epochs", "steps", "batch_size", "optimizer", "momentum", "weight_decay", "dropout", "loss",
    "depth", "width", "init", "code", "stride", "crop", "geometry", "preprocessing", "augmented", "subtracted",
    "scores_per_epoch", "score_every", "scored", "probe_size", "exam_size", "means_every", "fisher_every", "every", "equal_loss",
    "units_measured", "damping",
)  # fmt: skip


def per_run(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run: its seed, cell and learning rate, numbers at its end, along it, and
    ``exam_*``, at equal loss.

    ``unit_mean`` is the median over all hidden units of their mean activation (the paper's
    statistic), ``unit_mean_abs`` the mean of its absolute value, ``unit_mean_equal`` the first
    where the run came down to the equal loss, between two measurements. Shares of the bias shift
    that are ``inherited`` are over all measured steps, ``inherited_early`` over the first quarter
    of them, and ``inherited_equal`` over those before the equal loss. ``drift_units`` and
    ``drift_median`` are variances over epochs, see `drifts`. ``exam_*`` are those of
    `biasshift.experiments.exam.layer_statistics`, at damping 0.01, averaged over two disjoint
    probes and over the layers that are fed by an activation; NaN for a run that never came down to
    the equal loss. ``train_loss`` is `end_loss`. A run that was stopped before its last epoch, or
    whose last loss is not finite, has no numbers at its
    end: NaN. ``last_step`` is how far it got.

    Raises:
        ValueError: when the table lacks the columns of a run, or holds runs that cannot be
            compared: of two settings, of unequal learning rates, or two of one kind and seed.
    """
    import pandas as pd

    _refuse_mixture(table)
    runs, exams = cells_of(table), examinations(table)
    exams = exams[exams["exam_damping"] == REFERENCE_DAMPING].drop(
        columns=["activation", "seed", "exam_probe", "exam_damping"]
    )
    runs = runs.join(exams.groupby("run", observed=True).mean(), on="run")
    equal_steps = runs.set_index("run")["exam_step"]
    rows = [
        {"run": name, **_along(run, float(equal_steps[name]))}
        for name, run in table.groupby("run", observed=True, sort=False)
    ]
    return runs.join(pd.DataFrame(rows).set_index("run"), on="run")


def _refuse_mixture(table: "pd.DataFrame") -> None:
    if missing := [name for name in NEEDED if name not in table]:
        raise ValueError(f"These runs have no column '{missing[0]}': {REMEDY}.")
    runs = table.drop_duplicates("run")
    for name in [*SHARED, *(name for name in table if str(name).startswith("update_"))]:
        values = (
            sorted(runs[name].dropna().astype(object).unique(), key=str) if name in table else []
        )
        if len(values) > 1:
            raise ValueError(
                f"These runs differ in '{name}' ({', '.join(map(str, values))}): give runs of one "
                "setting."
            )


def _along(run: "pd.DataFrame", equal_step: float) -> dict[str, float]:
    """All numbers of one run that are not of its examination."""
    means = run[(run["unit"] >= 0) & run["mean"].notna()]
    behind = run[run["layer"].isin(fed_layers(run)) & run["own"].notna()]
    numbers = {
        "last_step": float(run["step"].max()),
        "unit_mean_equal": _median_at(means, equal_step),
        "inherited_early": inherited_share(behind[behind["step"] <= run["step"].max() / 4]),
        "inherited_equal": inherited_share(behind[behind["step"] <= equal_step]),
    }
    at_the_end = dict.fromkeys(
        ("unit_mean", "unit_mean_abs", "inherited", "train_loss", "drift_units", "drift_median"),
        float("nan"),
    )
    if has_ended(run):
        last = _last(means)["mean"].astype(float)
        at_the_end = {
            "unit_mean": last.median(),
            "unit_mean_abs": last.abs().mean(),
            "inherited": inherited_share(behind),
            "train_loss": end_loss(run),
            **drifts(means),
        }
    return at_the_end | numbers


def end_loss(run: "pd.DataFrame") -> float:
    """The training loss at the end: the median of the scores in the last tenth of the run, so that
    no single minibatch decides.
    """
    scores = run[run["train_loss"].notna()]
    return float(scores.loc[scores["step"] > END * scores["step"].max(), "train_loss"].median())


def has_ended(run: "pd.DataFrame") -> bool:
    """Whether a run got to its last epoch, with a loss that is a number: one that diverged may go
    on beside others of an ensemble.
    """
    import numpy as np

    scores = run[(run["layer"].astype(str) == "") & run["epoch"].notna()]
    return bool(
        run["epoch"].max() >= run["epochs"].iloc[0]
        and np.isfinite(_last(scores)["train_loss"].astype(float)).any()
    )


def _median_at(means: "pd.DataFrame", step: float) -> float:
    """The median over units of the mean activation, between the measurements before and after a
    step.
    """
    import numpy as np

    if not len(means) or not step <= means["step"].max():
        return float("nan")
    medians = means.groupby("step")["mean"].median()
    return float(np.interp(step, medians.index, medians.astype(float)))


def drifts(means: "pd.DataFrame") -> dict[str, float]:
    """How much mean activations vary over the measurements after step 0, layer by layer, and then
    on average over layers.

    ``drift_units``: the variance of every unit's mean activation, its median over the units;
    ``drift_median``: the variance of the median over the units. NaN with fewer than three
    measurements.
    """
    later = means[means["step"] > 0].astype({"layer": str})
    if later["step"].nunique() < FEWEST_MEASUREMENTS:
        return {"drift_units": float("nan"), "drift_median": float("nan")}
    units = later.groupby(["layer", "unit"])["mean"].var().groupby("layer").median()
    medians = later.groupby(["layer", "step"])["mean"].median().groupby("layer").var()
    return {"drift_units": float(units.mean()), "drift_median": float(medians.mean())}


def examinations(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run, probe and damping: the statistics at equal loss, means over the layers that
    are fed by an activation.
    """
    import pandas as pd

    columns = [name for name in QUANTITIES if name.startswith("exam_")]
    if "exam_damping" not in table:
        return pd.DataFrame(columns=[*EXAM_KEYS, *columns]).astype(
            dict.fromkeys(["exam_damping", *columns], "float64")
        )
    rows = table[table["exam_damping"].notna()]
    rows = rows.assign(exam_step=rows["step"].astype(float), exam_excluded=1 - rows["exam_enough"])
    return rows.groupby(list(EXAM_KEYS), observed=True, sort=False)[columns].mean().reset_index()


def fed_layers(run: "pd.DataFrame") -> list[str]:
    """Weight layers behind the first: those that are fed by an activation, not by the data.

    Raises:
        ValueError: when the runs do not say which layers they have.
    """
    if "inputs" not in run:
        raise ValueError(f"These runs have no column 'inputs': {REMEDY}.")
    return list(run[run["inputs"].notna()]["layer"].astype(str).drop_duplicates())[1:]


def layer_inputs(runs: "pd.DataFrame") -> "pd.Series":
    """Incoming activations of a unit, by the name of its layer."""
    known = runs[runs["inputs"].notna()]
    return known.assign(layer=known["layer"].astype(str)).groupby("layer")["inputs"].first()


def enough_samples(units: "pd.DataFrame", inputs: "pd.Series") -> "pd.Series":
    """Whether the rows of units have effective samples enough to carry a claim; ``inputs`` as
    `layer_inputs` has them.
    """
    return units["effective_samples"] >= SAMPLES_PER_INPUT * units["layer"].astype(str).map(
        inputs
    ).astype(float)


def inherited_share(rows: "pd.DataFrame") -> float:
    """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows."""
    own, incoming, second = (
        float(rows[name].abs().sum()) for name in ("own", "incoming", "second_order")
    )
    total = own + incoming + second
    return incoming / total if total > 0 else float("nan")


def _last(rows: "pd.DataFrame") -> "pd.DataFrame":
    return rows[rows["step"] == rows["step"].max()]
