"""theory4: networks trained by updates that take the bias shift out, beside those that do not."""

import re

import numpy as np
import pandas as pd

from biasshift import plots
from biasshift.activation_names import display_name, ordered
from biasshift.analysis.grid import CELL, Cell, best_rate, cells_of
from biasshift.analysis.learning_curves import common_levels, curves_of, reached
from biasshift.analysis.quantities import end_losses, have_ended
from biasshift.figures.captions import described, finish, over_seeds
from biasshift.figures.selection import kept
from biasshift.figures.spec import FigureSpec, Number

LEVELS = 2  # losses, as in the claims
UPDATES = ("plain", "centered", "centered-p", "quasi-diagonal", "full")
CURVE = ["update", "network"]  # whose runs differ in seed and learning rate only


# -- the small table ---------------------------------------------------------------------------


def training_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the training losses of every run, at all learning rates.

    `network` is the activation with what was added to it, "elu + 0.5 with batch norm"; `best` tells
    whether the run is at the best learning rate of its network and update. Of a run that diverged,
    the losses before that are kept.

    Raises:
        ValueError: networks and updates were not trained at the same learning rates.
    """
    plots.need(table, ["train_loss", "update", "lr", "activation", "epochs", "epoch"], "theory4")
    network = table.loc[table["layer"] == ""]
    rows = network.loc[network["train_loss"].notna()]
    plots.need(rows, [], "theory4")
    scored = network.loc[network["epoch"].notna()].astype({"run": str})
    ends = end_losses(scored).where(have_ended(scored))
    rows = rows.loc[np.isfinite(rows["train_loss"])]
    runs = cells_of(rows)
    runs["train_loss"] = runs["run"].astype(str).map(ends)
    rates = {cell: best_rate(group) for cell, group in runs.groupby(list(CELL))}
    runs["best"] = [
        rates[tuple(row[name] for name in CELL)] == row["lr"] for row in runs.to_dict("records")
    ]
    runs["network"] = [
        str(cell.activation)
        + (f" + {cell.constant:g}" if cell.constant else "")
        + (" with batch norm" if cell.batch_norm else "")
        for cell in runs.itertuples()
    ]
    columns = ["update", "constant", "batch_norm"]
    losses = kept(rows, ["epoch", "seconds", "train_loss"]).drop(columns=columns, errors="ignore")
    settings = runs[["run", *columns, "network", "best"]]
    return losses.astype({"run": object}).merge(settings.astype({"run": object}), on="run")


def at_best(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that are drawn: those at the best learning rate of their kind."""
    return table.loc[table["best"].astype(bool)]


# -- what is drawn -----------------------------------------------------------------------------


def theory4(table: pd.DataFrame) -> plots.Figure:
    """Returns learning curves of every update, and the steps to losses that all come down to.

    Each network is shown at its best learning rate. A network to which something is added has
    dashed lines, so that grey print tells it from the others.
    """
    updates, levels = [name for name in UPDATES if (table["update"] == name).any()], _steps(table)
    count = len(updates) + len(levels)
    figure, axes = plots.panels(count, rows=1 if count < 4 else 2, width=3.0, height=2.7)
    shown = _named(at_best(table))
    dashed = {_label(name): "--" for name in shown["network"].unique() if _parts(name)[1]}
    # Where training starts is high enough: a run that diverges and returns would squeeze all
    # others.
    starts = shown.loc[shown["step"] == shown["step"].min(), "train_loss"]
    limits = shown["train_loss"].min() * 0.9, 1.5 * starts.max()
    for ax, update in zip(axes, updates, strict=False):
        rows = shown.loc[shown["update"] == update]
        plots.curves(ax, rows, "train_loss", group="activation", log=True, line=dashed)
        ax.set(ylabel="training loss (nats)", ylim=limits)
    for ax, steps in zip(axes[len(updates) :], levels.values(), strict=False):
        plots.spans(ax, _spread(steps), at="update")
        ax.set(yscale="log", ylabel="steps", xlabel="update")
        plots.on_log_scale(ax.yaxis)
        plots.no_legend(ax)
    for ax in axes[count:]:
        ax.remove()
    letters = [*updates, *(f"steps to training loss {level:g}" for level in levels)]
    named = axes[: len(updates)]
    return finish(figure, axes[:count], letters, _heading(table), named, columns=5)


def numbers(table: pd.DataFrame) -> list[Number]:
    """Returns the steps to the common losses of every network and update.

    Each comes with the learning rate at which it is shown. If that is at an edge of the grid, the
    text says so: a better one may lie outside.
    """
    means = {
        level: _spread(steps).set_index(["update", "activation"])["mean"]
        for level, steps in _steps(table).items()
    }
    curves = at_best(table).drop_duplicates(CURVE).to_dict("records")
    edges, listed = _at_an_edge(table), []
    updates = [*UPDATES, *sorted({row["update"] for row in curves} - {*UPDATES})]
    present = {row["network"] for row in curves}
    networks = [*ordered(present), *sorted(present - {*ordered(present)})]
    for row in sorted(
        curves, key=lambda row: (updates.index(row["update"]), networks.index(row["network"]))
    ):
        update, network = row["update"], row["network"]
        at = update, _drawn_as(network)
        here = [f"{steps.loc[at]:.0f} steps to {level:g}" for level, steps in means.items()]
        edge = ", an edge of the grid" * ((update, network) in edges)
        name = f"{Cell(_label(network), update).name}, learning rate {row['lr']:g}{edge}"
        listed.append(Number(name, ", ".join(here) or "–"))
    return listed


def _steps(table: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """The two lowest losses of the 1-2-5 series that all runs at their best rates come down to →
    every run's steps there.
    """
    best = at_best(table)
    runs, curves = best.groupby("run", sort=False), curves_of(best)
    settings = {str(name): rows[[*CURVE, "seed", "lr"]].iloc[0].to_dict() for name, rows in runs}
    return {
        level: pd.DataFrame(
            [settings[name] | {"steps": reached(curve, level)} for name, curve in curves.items()]
        )
        for level in common_levels(curves.values(), LEVELS)
    }


def _spread(steps: pd.DataFrame) -> pd.DataFrame:
    """Mean and mean ± SD of the logarithm of the steps, for every network and update."""
    rows = _named(steps.assign(ln=np.log(steps["steps"].astype(float).clip(lower=1))))
    groups = rows.groupby(["update", "activation"], sort=False, observed=True)["ln"]
    moments = groups.agg(["mean", "std", "size"]).reset_index()
    sd = moments["std"].fillna(0)
    return moments.assign(
        order=moments["update"].map({name: place for place, name in enumerate(UPDATES)}),
        mean=np.exp(moments["mean"]),
        low=np.exp(moments["mean"] - sd),
        high=np.exp(moments["mean"] + sd),
        n=moments["size"],
    ).sort_values("order", kind="stable")


def _at_an_edge(table: pd.DataFrame) -> set[tuple[str, str]]:
    """The updates and networks whose best rate is the lowest or the highest of several that were
    tried for them.
    """
    rates = table.groupby(CURVE, observed=True)["lr"].agg(["min", "max"])
    best = at_best(table).groupby(CURVE, observed=True)["lr"].first()
    edge = (rates["min"] < rates["max"]) & ((best == rates["min"]) | (best == rates["max"]))
    return {(str(update), str(network)) for update, network in edge[edge].index}


# -- what is said about it ---------------------------------------------------------------------


def _heading(table: pd.DataFrame) -> str:
    """What is drawn, how the full update was computed, and which best rates might be better still
    outside the grid.
    """
    shown, edges = at_best(table), _at_an_edge(table)
    lines = [
        "Each at its best learning rate of those tried for all; "
        f"{over_seeds(shown, 'mean ± SD of logarithms over seeds')}",
        described(shown),
    ]
    if "update_every" in shown:
        every = shown.loc[shown["update"] == "full", "update_every"].dropna().unique()
        lines += [
            f"The full update looks at its curvature every {steps:g} steps" for steps in every
        ]
    named = [
        f"{_label(row['network'])}, {row['update']} ({row['lr']:g})"
        for row in shown.drop_duplicates(CURVE).to_dict("records")
        if (row["update"], row["network"]) in edges
    ]
    if named:
        rates = sorted({table["lr"].min(), table["lr"].max()})
        grid = " to ".join(f"{rate:g}" for rate in rates)
        lines.append(f"Best rate at an edge of those tried, {grid}: {'; '.join(named)}")
    return "\n".join(lines)


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Networks to which something is added, as activations of their own; in every part of the table
    they look the same.
    """
    names = [_drawn_as(name) for name in table["network"]]
    return table.assign(activation=pd.Categorical(names, categories=sorted(set(names))))


def _label(network: str) -> str:
    """ "ELU + 0.5"."""
    activation, added = _parts(network)
    return display_name(activation) + added


def _drawn_as(network: str) -> str:
    """The name of an activation function where nothing is added, which has a look of its own."""
    return _label(network) if _parts(network)[1] else network


def _parts(network: str) -> tuple[str, str]:
    """The activation, and what is added to the network: " + 0.5 with batch norm"."""
    (parts,) = re.findall(r"(?s)^(.*?)((?: \+ \S+)?(?: with batch norm)?)$", network)
    return parts


FIGURES = {
    "theory4": FigureSpec(
        title="Is it causal? Updates that take the bias shift out",
        command="biasshift sweep",
        paper="no such figure",
        condense=training_losses,
        panels=theory4,
        numbers=numbers,
        experiments=("sweep",),
        quick=("sweep --seeds 1 --lr 0.03 --update plain centered --scored 1000",),
        compared=("update", "constant", "batch_norm", "lr"),
        drawn=at_best,
    )
}
