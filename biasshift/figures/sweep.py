"""theory4: networks trained by updates that take the bias shift out, beside those that do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from biasshift import plots
from biasshift.analysis.grid import CELL, NAMES, Cell, best_rate, cells_of
from biasshift.analysis.learning_curves import common_levels, curve_of, reached
from biasshift.analysis.per_run import end_loss, has_ended
from biasshift.figures.captions import described, over_seeds
from biasshift.figures.selection import kept
from biasshift.figures.spec import Drawing, Number

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

LEVELS = 2  # losses, as in the claims
UPDATES = ("plain", "centered", "centered-p", "quasi-diagonal", "full")


def best(table: pd.DataFrame) -> pd.DataFrame:
    """The training losses of every run; `network` is its activation with what was added to it,
    `best` whether at its cell's best rate.

    Raises:
        ValueError: cells were not trained at the same learning rates.
    """
    import numpy as np

    plots.need(table, ["train_loss", "update", "lr", "activation", "epochs", "epoch"], "theory4")
    rows = table.loc[(table["layer"] == "") & table["train_loss"].notna()]
    plots.need(rows, [], "theory4")
    network = table.loc[(table["layer"] == "") & table["epoch"].notna()].astype({"run": str})
    ends = {
        name: end_loss(run) if has_ended(run) else math.nan for name, run in network.groupby("run")
    }
    rows = rows.loc[np.isfinite(rows["train_loss"])]  # of a run that diverged, what came before
    runs = cells_of(rows)
    runs["train_loss"] = runs["run"].astype(str).map(ends)
    rates = {cell: best_rate(group) for cell, group in runs.groupby(list(CELL))}
    runs["best"] = [
        rates[tuple(row[name] for name in CELL)] == row["lr"] for row in runs.to_dict("records")
    ]
    runs["network"] = [_network(cell) for cell in runs.itertuples()]
    own = ["update", "constant", "batch_norm"]
    found = (
        kept(rows, ["epoch", "seconds", "train_loss"])
        .drop(columns=own, errors="ignore")
        .astype({"run": object})
    )
    return found.merge(runs[["run", *own, "network", "best"]].astype({"run": object}), on="run")


def _network(cell: Any) -> str:
    return (
        str(cell.activation)
        + (f" + {cell.constant:g}" if cell.constant else "")
        + (" with batch norm" if cell.batch_norm else "")
    )


def steps_to(table: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """The two lowest losses of the 1-2-5 series that all runs at their best rates come down to →
    every run's steps there.
    """
    import pandas as pd

    runs = table.loc[table["best"]].groupby("run", sort=False)
    curves = {name: curve_of(rows) for name, rows in runs}
    cells = {
        name: {key: rows[key].iloc[0] for key in ("update", "network", "seed", "lr")}
        for name, rows in runs
    }
    return {
        level: pd.DataFrame(
            [cells[name] | {"steps": reached(curve, level)} for name, curve in curves.items()]
        )
        for level in common_levels(curves.values(), LEVELS)
    }


def theory4(table: pd.DataFrame) -> Figure:
    """Learning curves of every update, and the steps to losses that all come down to, each at its
    best learning rate.
    """
    updates, levels = [name for name in UPDATES if (table["update"] == name).any()], steps_to(table)
    count = len(updates) + len(levels)
    figure, axes = plots.panels(count, rows=1 if count < 4 else 2, width=3.0, height=2.7)
    shown = named(table.loc[table["best"]])
    # Where training starts is high enough: a run that blows up and comes back would squeeze all
    # others.
    low, high = (
        shown["train_loss"].min(),
        1.5 * shown.loc[shown["step"] == shown["step"].min(), "train_loss"].max(),
    )
    changed = {
        name: "--" for name in shown["activation"].unique() if name not in NAMES
    }  # told from the others in grey print, too
    for ax, update in zip(axes, updates, strict=False):
        plots.curves(
            ax,
            shown.loc[shown["update"] == update],
            "train_loss",
            group="activation",
            log=True,
            line=changed,
        )
        ax.set(ylabel="training loss (nats)", ylim=(low * 0.9, high))
    for ax, steps in zip(axes[len(updates) :], levels.values(), strict=False):
        plots.spans(ax, spread(steps), at="update")
        ax.set(yscale="log", ylabel="steps", xlabel="update")
        plots.on_log_scale(ax.yaxis)
        plots.no_legend(ax)
    plots.lettered(axes, [*updates, *(f"steps to training loss {level:g}" for level in levels)])
    plots.one_legend(figure, axes[: len(updates)], columns=5)
    for ax in axes[count:]:
        ax.remove()
    plots.headed(figure, heading(table))
    return figure


def at_best(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that are drawn."""
    return table.loc[table["best"].astype(bool)]


def heading(table: pd.DataFrame) -> str:
    """What is drawn, how the full update was computed, and which best rates might be better still
    outside the grid.
    """
    shown = at_best(table)
    looked = (
        shown.loc[shown["update"] == "full", "update_every"].dropna().unique()
        if "update_every" in shown
        else []
    )
    lines = [
        "Each at its best learning rate of those tried for all; "
        f"{over_seeds(shown, 'mean ± SD of logarithms over seeds')}",
        described(shown),
        *(f"The full update looks at its curvature every {every:g} steps" for every in looked),
    ]
    edges = at_an_edge(table)
    cells = shown.drop_duplicates(["update", "network"])
    named_edges = [
        _named_cell(row)
        for row in cells.to_dict("records")
        if (row["update"], row["network"]) in edges
    ]
    if named_edges:
        lines.append(
            f"Best rate at an edge of those tried, {_grid(table)}: {'; '.join(named_edges)}"
        )
    return "\n".join(lines)


def at_an_edge(table: pd.DataFrame) -> set[tuple[str, str]]:
    """The updates and networks whose best rate is the lowest or the highest of several that were
    tried for them.
    """
    rates = table.groupby(["update", "network"], observed=True)["lr"].agg(["min", "max"])
    best = at_best(table).groupby(["update", "network"], observed=True)["lr"].first()
    edge = (rates["min"] < rates["max"]) & ((best == rates["min"]) | (best == rates["max"]))
    return {(str(update), str(network)) for update, network in edge[edge].index}


def _grid(table: pd.DataFrame) -> str:
    return " to ".join(f"{rate:g}" for rate in sorted({table["lr"].min(), table["lr"].max()}))


def _named_cell(row: dict[str, Any]) -> str:
    return f"{label(row['network'])}, {row['update']} ({row['lr']:g})"


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Networks to which something is added, as activations of their own; in every part of the table
    they look the same.
    """
    import pandas as pd

    shown = [name if name in NAMES else label(name) for name in table["network"]]
    return table.assign(activation=pd.Categorical(shown, categories=sorted(set(shown))))


def label(network: str) -> str:
    """ "ELU + 0.5" """
    activation, space, added = network.partition(" ")
    return NAMES.get(activation, activation) + space + added


def spread(steps: pd.DataFrame) -> pd.DataFrame:
    """Mean and mean ± SD of the logarithm of the steps, cell by cell."""
    import numpy as np

    rows = named(steps.assign(ln=np.log(steps["steps"].astype(float).clip(lower=1))))
    found = (
        rows.groupby(["update", "activation"], sort=False, observed=True)["ln"]
        .agg(["mean", "std", "size"])
        .reset_index()
    )
    sd = found["std"].fillna(0)
    order = found["update"].map({name: place for place, name in enumerate(UPDATES)})
    numbers = {
        "mean": np.exp(found["mean"]),
        "low": np.exp(found["mean"] - sd),
        "high": np.exp(found["mean"] + sd),
        "n": found["size"],
    }
    return found.assign(order=order, **numbers).sort_values("order", kind="stable")


def numbers(table: pd.DataFrame) -> list[Number]:
    """Steps to the common losses, and the learning rate that each cell is shown at."""
    found = {
        level: spread(steps).set_index(["update", "activation"])["mean"]
        for level, steps in steps_to(table).items()
    }
    cells = at_best(table).drop_duplicates(["update", "network"]).to_dict("records")
    edges, listed = at_an_edge(table), []
    updates = {update: place for place, update in enumerate(UPDATES)}
    order = [*plots.looks(NAMES), *sorted({row["network"] for row in cells} - {*NAMES})]
    for row in sorted(
        cells,
        key=lambda row: (updates.get(row["update"], len(updates)), order.index(row["network"])),
    ):
        update, network = row["update"], row["network"]
        at = update, network if network in NAMES else label(network)
        here = (
            ", ".join(f"{steps.loc[at]:.0f} steps to {level:g}" for level, steps in found.items())
            or "–"
        )
        edge = ", an edge of the grid" * ((update, network) in edges)
        listed.append(
            Number(f"{Cell(label(network), update).name}, learning rate {row['lr']:g}{edge}", here)
        )
    return listed


FIGURES = {
    "theory4": Drawing(
        "Is it causal? Updates that take the bias shift "
        "out", "biasshift sweep", "no such figure", best, theory4, numbers, ("sweep",),
        {}, ("sweep --seeds 1 --lr 0.03 --update plain centered --scored "
             "1000",), apart=("update", "constant", "batch_norm", "lr"),
        shown=at_best,
    ),
}  # fmt: skip
