"""theory1 to theory3: what the theory says about networks, measured along training."""

import pandas as pd

from biasshift import plots
from biasshift.analysis.formatting import mean_and_sd
from biasshift.analysis.quantities import (
    ENOUGH_UNITS,
    SAMPLES_PER_INPUT,
    enough_samples,
    fed_layers,
    layer_inputs,
)
from biasshift.figures.captions import described, finish, over_seeds
from biasshift.figures.mlp import PLAIN
from biasshift.figures.selection import kept, with_settings
from biasshift.figures.spec import FigureSpec, Number, by_activation, final_values

PARTS = {"own": "own weights", "incoming": "inherited", "second_order": "second order"}
MEANS = ("k", "norm_mean_p", "norm_corrected_mean")
OBJECTS = {"run": object, "layer": object}  # not categories, some of which have no rows


# -- theory1: the gradient gap -----------------------------------------------------------------


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Returns gradient gap and mean incoming activation of layers that are fed by an activation.

    One row per run, step and layer. `enough` is the share of the layer's measured units with enough
    effective samples: of few samples the gap looks larger than it is.
    """
    points = plots.gap_points(table, layers=fed_layers(table)).astype(OBJECTS)
    if "effective_samples" not in table or "inputs" not in table:
        return kept(points, ["mean_in_abs", "cos_gradient"])
    layer = ["run", "step", "layer"]
    shares = _measured_units(table).groupby(layer)["enough"].mean().reset_index()
    points = points.merge(shares, on=layer, how="left")
    return kept(points, ["mean_in_abs", "cos_gradient", "enough"])


def _measured_units(table: pd.DataFrame) -> pd.DataFrame:
    """The measured units of layers that are fed by an activation; `enough`: 1.0 where a unit has
    enough effective samples, else 0.0.
    """
    units = table.loc[
        table["layer"].isin(fed_layers(table))
        & (table["unit"] >= 0)
        & table["effective_samples"].notna()
    ]
    enough = enough_samples(units, layer_inputs(table)).astype(float)
    return units.assign(enough=enough).astype(OBJECTS)


def gap(table: pd.DataFrame) -> plots.Figure:
    """Returns the gradient gap against the mean incoming activation, a dot per layer and step.

    Layers are those that are fed by an activation. What the gap is said to grow with is on the x
    axis.
    """
    figure, (ax,) = plots.panels(1)
    plots.gap_against_mean(ax, table)
    plots.headed(figure, described(table))
    ax.set_title(gap_title(table), loc="left")
    return figure


def gap_title(table: pd.DataFrame) -> str:
    """Returns what the dots are, and where there are some, what the hollow ones are.

    Those are of layers most of whose units have too few effective samples.
    """
    few = "enough" in table and (table["enough"] < ENOUGH_UNITS).any()
    note = "\nsmall and hollow: too few effective samples, not counted" if few else ""
    return f"a dot per layer, run and measurement; large: medians{note}"


def gap_numbers(table: pd.DataFrame) -> list[Number]:
    """Returns the medians of what is drawn, without the hollow dots."""
    counted = table.loc[~(table["enough"] < ENOUGH_UNITS)] if "enough" in table else table
    if not len(counted):
        return []
    return [
        Number(
            f"median gap and mean incoming activation, {label}",
            f"{rows['degrees'].median():.1f} degrees, {rows['mean_in_abs'].median():.2g}",
        )
        for _, label, rows in by_activation(plots.gap_points(counted))
    ]


# -- theory2: Theorem 2 along training ---------------------------------------------------------


def effective_means(table: pd.DataFrame) -> pd.DataFrame:
    """Returns medians over units of k, |E_p(a)| and |E_p(a) − k E_q(a)|: a row per run and step.

    Units of layers fed by the data are left out. So are those with fewer than ten effective samples
    per incoming activation: their k is biased. `enough` is the share of units that are left, and
    `smaller` the share of those whose corrected mean is the smaller one. Where no unit is left,
    `enough` is 0 and the others are NaN.
    """
    plots.need(table, [*MEANS, "effective_samples", "inputs", "activation"], "theory2")
    units, step = _measured_units(table), ["run", "step"]
    plots.need(units, [], "theory2")
    units["enough"] = units["enough"].where(units["k"].notna(), 0.0)
    sure = units.loc[units["enough"] > 0]
    sure = sure.assign(smaller=(sure["norm_corrected_mean"] < sure["norm_mean_p"]).astype(float))
    by_step = sure.groupby(step)
    rows = units.groupby(step)[["enough"]].mean().join(by_step[list(MEANS)].median())
    rows = rows.join(by_step["smaller"].mean()).reset_index()
    return _with_epochs(rows.assign(layer="", unit=-1), table)


def theory2(table: pd.DataFrame) -> plots.Figure:
    """Returns the k of Theorem 2 along training, and the means that it corrects.

    The middle panel shows their norms before (solid) and after (dotted) the correction, the right
    one the share of units with enough samples.
    """
    figure, (left, middle, right) = plots.panels(3, width=2.9)
    plots.curves(left, table, "k", against="epoch", line="-")
    left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set_ylabel("$k$, median over units")
    for column, line, name in (
        ("norm_mean_p", "-", r"$|E_p(a)|$"),
        ("norm_corrected_mean", ":", r"$|E_p(a) - k\,E_q(a)|$"),
    ):
        plots.curves(middle, table, column, against="epoch", line=line, named=False)
        middle.plot([], [], line, color="0.4", label=name)
    middle.set_ylabel("norm, median over units")
    middle.set_ylim(bottom=0)
    plots.curves(right, table, "enough", against="epoch", line="-", named=False)
    plots.in_percent(right.yaxis)
    right.set(ylabel="units (%)", ylim=(0, 1.05))
    return finish(
        figure,
        [left, middle, right],
        [
            "factor of the correction",
            "means, as they are and corrected",
            "units with enough samples",
        ],
        f"{over_seeds(table)}, units with {SAMPLES_PER_INPUT} effective samples per input or "
        f"more\n{described(table)}",
    )


def numbers2(table: pd.DataFrame) -> list[Number]:
    """Returns k and the means at the last step at which most units have enough samples.

    Then the shares of units with |μ − k m| < |μ| before training, after the first epoch, and at the
    end. Only units with enough samples count; where no run has any at the end, that is said. Tables
    of earlier versions do not have these shares.
    """
    enough = table.loc[table["enough"] >= ENOUGH_UNITS]
    numbers = [
        *final_values(enough, "k", {}, "k, as long as most units have enough samples"),
        *final_values(enough, "norm_mean_p", {}, "norm of the mean, likewise"),
        *final_values(enough, "norm_corrected_mean", {}, "norm of the corrected mean, likewise"),
    ]
    if "smaller" in table:
        moments = {
            "at initialization": table["step"] == 0,
            "after the first epoch": table["epoch"].round(6) == 1,
            "at the end": table["step"] == table.groupby("run")["step"].transform("max"),
        }
        for moment, rows in moments.items():
            name = f"units with |μ − k m| < |μ| {moment}"
            numbers += final_values(table.loc[rows], "smaller", {}, name, percent=True)
        ends = table.loc[moments["at the end"]]
        numbers += [
            Number(f"{name}, {label}", "none: no unit has enough samples")
            for _, label, rows in by_activation(ends)
            if rows["smaller"].isna().all()
        ]
    return numbers


# -- theory3: the parts of the bias shift ------------------------------------------------------


def parts(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the sums over the units of a layer of |own|, |incoming| and |second order|.

    One row per run, step and layer behind the first; `number` counts layers, from 2.
    """
    plots.need(table, [*PARTS, "activation"], "theory3")
    rows = table.loc[
        table["layer"].isin(fed_layers(table)) & (table["unit"] >= 0) & table["own"].notna()
    ]
    plots.need(rows, [], "theory3")
    rows = rows.assign(**{name: rows[name].astype(float).abs() for name in PARTS}).astype(OBJECTS)
    sums = rows.groupby(["run", "step", "layer"], sort=False)[list(PARTS)].sum().reset_index()
    number = sums.groupby("run")["layer"].transform(lambda names: names.factorize()[0] + 2)
    return _with_epochs(sums.assign(number=number, unit=0), table)


def theory3(table: pd.DataFrame) -> plots.Figure:
    """Returns what the bias shift is made of: over the whole run, along it, and layer by layer.

    The left panel shows the shares of all three parts, the others that of the inherited part.
    """
    figure, (left, middle, right) = plots.panels(3, width=2.9)
    whole = _shares(table).groupby("activation", observed=True)[list(PARTS)].mean()
    plots.stacked(left, whole.reset_index(), PARTS)
    left.set_ylabel("share of the bias shift")
    along = _shares(table, "step", "epoch").assign(layer="")
    plots.curves(middle, along, "incoming", against="epoch", line="-")
    plots.layer_lines(right, _shares(table, "number"), "incoming")
    right.set_xlabel("layer")
    for ax in (middle, right):
        ax.set(ylim=(0, 1), ylabel="inherited share")
    return finish(
        figure,
        [left, middle, right],
        ["whole run", "along training", "by layer"],
        "Sums of absolute parts over units, "
        f"{over_seeds(table, 'mean ± SD over seeds')}\n{described(table)}",
        named=[left, middle],
    )


def numbers3(table: pd.DataFrame) -> list[Number]:
    """Returns the inherited share of the bias shift over the whole run, mean ± SD over runs."""
    return [
        Number(
            f"inherited share of the bias shift, {label}",
            f"{mean_and_sd(rows['incoming'])} (n = {len(rows)})",
        )
        for _, label, rows in by_activation(_shares(table))
        if len(rows)
    ]


def _shares(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """One row per run and combination of `keys`: the shares of the parts, which add up to 1."""
    runs = ["run", "activation", *(["seed"] if "seed" in table else [])]
    sums = table.groupby([*runs, *keys], observed=True, sort=True)[list(PARTS)].sum()
    return sums.div(sums.sum(axis=1), axis=0).reset_index()


def _with_epochs(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of runs and steps with the epochs and the settings of their runs."""
    step = ["run", "step"]
    epochs = plots.with_epochs(table[[*step, "epoch"]]).drop_duplicates(step)
    rows = rows.merge(epochs.astype({"run": object}), on=step, how="left")
    return with_settings(rows, table)


# What they have in common: the runs that they are about, and that no number of the paper is of it.
_COMMON = {
    "command": "biasshift demo, or biasshift train mnist",
    "paper": "no such figure",
    "experiments": ("digits", "mnist", "sweep", "autoencoder", "cifar11", "cifar18", "imagenet"),
    "prefer": {"depth": 8, "width": 128, "batch_norm": False, **PLAIN},
    "quick": ("demo --quick",),
    "irrelevant": (),
}
FIGURES = {
    "theory1": FigureSpec(
        title="The gradient gap against the mean incoming activation",
        condense=gaps,
        panels=gap,
        numbers=gap_numbers,
        **_COMMON,
    ),
    "theory2": FigureSpec(
        title="Theorem 2 along training: k and the corrected means",
        condense=effective_means,
        panels=theory2,
        numbers=numbers2,
        **_COMMON,
    ),
    "theory3": FigureSpec(
        title="The parts of the bias shift",
        condense=parts,
        panels=theory3,
        numbers=numbers3,
        **_COMMON,
    ),
}
