"""theory1 to theory3: what the theory says about networks, measured along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.analysis.formatting import mean_and_sd
from biasshift.analysis.per_run import (
    ENOUGH_UNITS,
    SAMPLES_PER_INPUT,
    enough_samples,
    fed_layers,
    layer_inputs,
)
from biasshift.figures.captions import described, over_seeds
from biasshift.figures.mlp import PLAIN
from biasshift.figures.selection import kept, with_settings
from biasshift.figures.spec import Drawing, Number, finals

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

PARTS = {"own": "own weights", "incoming": "inherited", "second_order": "second order"}
MEANS = ("k", "norm_mean_p", "norm_corrected_mean")


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Gradient gap and mean incoming activation of every layer that is fed by an activation.

    `enough` is the share of its measured units with enough effective samples: of few samples the
    gap looks larger than it is.
    """
    points = plots.gap_points(table, layers=fed_layers(table)).astype(
        {"run": object, "layer": object}
    )
    if "effective_samples" not in table or "inputs" not in table:
        return kept(points, ["mean_in_abs", "cos_gradient"])
    units = _with_enough(table)
    shares = units.groupby(["run", "step", "layer"])["enough"].mean().reset_index()
    return kept(
        points.merge(shares, on=["run", "step", "layer"], how="left"),
        ["mean_in_abs", "cos_gradient", "enough"],
    )


def _with_enough(table: pd.DataFrame) -> pd.DataFrame:
    """The measured units of layers that are fed by an activation; `enough`: 1.0 where a unit has
    effective samples enough, else 0.0.
    """
    units = table.loc[
        table["layer"].isin(fed_layers(table))
        & (table["unit"] >= 0)
        & table["effective_samples"].notna()
    ]
    return units.assign(enough=enough_samples(units, layer_inputs(table)).astype(float)).astype(
        {"run": object, "layer": object}
    )


def gap(table: pd.DataFrame) -> Figure:
    """The gradient gap of every layer that is fed by an activation, against its mean incoming
    activation.
    """
    figure, (ax,) = plots.panels(1)
    plots.gap_against_mean(ax, table)
    plots.headed(figure, described(table))
    ax.set_title(gap_title(table), loc="left")
    return figure


def gap_title(table: pd.DataFrame) -> str:
    """What the dots are; hollow ones, where there are some, of layers most of whose units have too
    few effective samples.
    """
    few = "enough" in table and (table["enough"] < ENOUGH_UNITS).any()
    note = "\nsmall and hollow: too few effective samples, not counted" if few else ""
    return f"a dot per layer, run and measurement; large: medians{note}"


def gap_numbers(table: pd.DataFrame) -> list[Number]:
    """Medians of what is drawn and counted."""
    counted = table.loc[~(table["enough"] < ENOUGH_UNITS)] if "enough" in table else table
    if not len(counted):
        return []
    points = plots.gap_points(counted)
    found = []
    for name, look in plots.looks(points["activation"].unique()).items():
        row = points.loc[points["activation"] == name, ["degrees", "mean_in_abs"]].median()
        found.append(
            Number(
                f"median gap and mean incoming activation, {look.label}",
                f"{row.degrees:.1f} degrees, {row.mean_in_abs:.2g}",
            )
        )
    return found


def effective_means(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over units of k, |E_p(a)| and |E_p(a) − k E_q(a)|: one row per run and step, of units
    with enough samples.

    Units of layers fed by the data are left out, as are those with fewer than ten effective samples
    per incoming activation: their k is biased. `enough` is the share of units that are left, and
    `smaller` the share of those whose corrected mean is the smaller one.
    """
    plots.need(table, [*MEANS, "effective_samples", "inputs", "activation"], "theory2")
    rows = _with_enough(table)
    plots.need(rows, [], "theory2")
    rows["enough"] = rows["enough"].where(rows["k"].notna(), 0.0)
    shares = rows.groupby(["run", "step"])["enough"].mean()
    sure = rows.loc[rows["enough"] > 0]
    sure = sure.assign(smaller=(sure["norm_corrected_mean"] < sure["norm_mean_p"]).astype(float))
    medians = (
        sure.groupby(["run", "step"])[list(MEANS)]
        .median()
        .join(sure.groupby(["run", "step"])["smaller"].mean())
    )
    return _with_epochs(medians.join(shares).reset_index().assign(layer="", unit=-1), table)


def theory2(table: pd.DataFrame) -> Figure:
    """The k of Theorem 2 along training, and the means that it corrects, before and after."""
    figure, (left, middle, right) = plots.panels(3, width=2.9)
    plots.curves(left, table, "k", against="epoch", line="-")
    left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set_ylabel("$k$, median over units")
    plots.curves(middle, table, "norm_mean_p", against="epoch", line="-", named=False)
    plots.curves(middle, table, "norm_corrected_mean", against="epoch", line=":", named=False)
    for line, name in (("-", r"$|E_p(a)|$"), (":", r"$|E_p(a) - k\,E_q(a)|$")):
        middle.plot([], [], line, color="0.4", label=name)
    middle.set_ylabel("norm, median over units")
    middle.set_ylim(bottom=0)
    plots.curves(right, table, "enough", against="epoch", line="-", named=False)
    plots.in_percent(right.yaxis)
    right.set(ylabel="units (%)", ylim=(0, 1.05))
    plots.lettered(
        [left, middle, right],
        [
            "factor of the correction",
            "means, as they are and corrected",
            "units with enough samples",
        ],
    )
    plots.one_legend(figure, [left, middle])
    plots.headed(
        figure,
        f"{over_seeds(table)}, units with {SAMPLES_PER_INPUT} effective samples per input or "
        f"more\n{described(table)}",
    )
    return figure


def numbers2(table: pd.DataFrame) -> list[Number]:
    """At the last step that most units have enough samples at; and the share of units whose mean
    the correction makes smaller.
    """
    enough = table.loc[table["enough"] >= ENOUGH_UNITS]
    return [
        *finals(enough, "k", {}, "k, as long as most units have enough samples"),
        *finals(enough, "norm_mean_p", {}, "norm of the mean, likewise"),
        *finals(enough, "norm_corrected_mean", {}, "norm of the corrected mean, likewise"),
        *_smaller(table),
    ]


def _smaller(table: pd.DataFrame) -> list[Number]:
    """Shares of units with |μ − k m| < |μ|, of those with enough samples: before training, after
    the first epoch, at the end.
    """
    if "smaller" not in table:
        return []
    last, first = table.groupby("run")["step"].transform("max"), table["epoch"].round(6) == 1
    moments = {
        "at initialization": table["step"] == 0,
        "after the first epoch": first,
        "at the end": table["step"] == last,
    }
    return [
        number
        for name, rows in moments.items()
        for number in finals(
            table.loc[rows], "smaller", {}, f"units with |μ − k m| < |μ| {name}", percent=True
        )
    ]


def parts(table: pd.DataFrame) -> pd.DataFrame:
    """Sums over the units of a layer of |own|, |incoming| and |second order|, for every run, step
    and layer behind the first.
    """
    plots.need(table, [*PARTS, "activation"], "theory3")
    rows = table.loc[
        table["layer"].isin(fed_layers(table)) & (table["unit"] >= 0) & table["own"].notna()
    ]
    plots.need(rows, [], "theory3")
    rows = rows.assign(**{name: rows[name].astype(float).abs() for name in PARTS}).astype(
        {"run": object, "layer": object}
    )
    sums = rows.groupby(["run", "step", "layer"], sort=False)[list(PARTS)].sum().reset_index()
    number = sums.groupby("run")["layer"].transform(lambda names: names.factorize()[0] + 2)
    return _with_epochs(sums.assign(number=number, unit=0), table)


def theory3(table: pd.DataFrame) -> Figure:
    """Of what the bias shift is made: over the whole run, along it, and layer by layer."""
    figure, (left, middle, right) = plots.panels(3, width=2.9)
    plots.stacked(
        left,
        shares(table, []).groupby("activation", observed=True)[list(PARTS)].mean().reset_index(),
        PARTS,
    )
    left.set_ylabel("share of the bias shift")
    along = shares(table, ["step", "epoch"]).assign(layer="")
    plots.curves(middle, along, "incoming", against="epoch", line="-")
    plots.layer_lines(right, shares(table, ["number"]), "incoming")
    right.set_xlabel("layer")
    for ax in (middle, right):
        ax.set(ylim=(0, 1), ylabel="inherited share")
    plots.lettered([left, middle, right], ["whole run", "along training", "by layer"])
    plots.one_legend(figure, [left, middle])
    plots.headed(
        figure,
        "Sums of absolute parts over units, "
        f"{over_seeds(table, 'mean ± SD over seeds')}\n{described(table)}",
    )
    return figure


def shares(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per run and combination of `keys`: the shares of the three parts, which add up to 1."""
    runs = ["run", "activation", *(["seed"] if "seed" in table else [])]
    sums = table.groupby([*runs, *keys], observed=True, sort=True)[list(PARTS)].sum()
    return sums.div(sums.sum(axis=1), axis=0).reset_index()


def numbers3(table: pd.DataFrame) -> list[Number]:
    """Inherited shares over the whole run."""
    whole = shares(table, [])
    return [
        Number(
            f"inherited share of the bias shift, {look.label}",
            f"{mean_and_sd(rows['incoming'])} (n = {len(rows)})",
        )
        for name, look in plots.looks(whole["activation"].unique()).items()
        if len(rows := whole.loc[whole["activation"] == name])
    ]


def _with_epochs(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of runs and steps with the epochs and the settings of their runs."""
    epochs = (
        plots.with_epochs(table[["run", "step", "epoch"]])
        .drop_duplicates(["run", "step"])
        .astype({"run": object})
    )
    return with_settings(rows.merge(epochs, on=["run", "step"], how="left"), table)


OWN = "no such figure"
EVERY = ("digits", "mnist", "sweep", "autoencoder", "cifar11", "cifar18", "imagenet")
NARROW = {"depth": 8, "width": 128, "batch_norm": False, **PLAIN}
DEMO, QUICK = "biasshift demo, or biasshift train mnist", ("demo --quick",)
FIGURES = {
    "theory1": Drawing(
        "The gradient gap against the mean incoming "
        "activation", DEMO, OWN, gaps, gap, gap_numbers, EVERY, NARROW, QUICK, unshown=(),
    ),
    "theory2": Drawing(
        "Theorem 2 along training: k and the corrected means", DEMO, OWN,
        effective_means, theory2, numbers2, EVERY, NARROW, QUICK, unshown=(),
    ),
    "theory3": Drawing(
        "The parts of the bias "
        "shift", DEMO, OWN, parts, theory3, numbers3, EVERY, NARROW, QUICK, unshown=(),
    ),
}  # fmt: skip
