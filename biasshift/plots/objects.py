"""One picture of whatever was measured: a log, its table, unit Fisher matrices, moments, shifts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biasshift.plots.theme import escaped, looks, panels, style

# Of a table of training: column → what its axis says. Medians over units, a line per layer.
ALONG = {
    "mean": "mean activation",
    "own": "bias shift, own",
    "incoming": "bias shift, incoming",
    "coupling": "bias coupling $h$",
    "k": "$k$",
    "cos_gradient": "cosine of gradient and\nunit natural gradient",
}
FISHER = {"coupling": "bias coupling $h$", "k": "$k$", "s": "$s$"}
MOMENTS = {"mean": "mean activation", "var": "variance of the activation"}
SHIFTS = {"total": "bias shift", "own": "own part", "incoming": "incoming part"}
GAP = {
    "cos_gradient": "cosine of gradient and\nunit natural gradient",
    "cos_centered": "cosine of centered gradient and\nunit natural gradient",
    "cos_diagonal": "cosine of quasi-diagonal and\nunit natural gradient",
}
KINDS = (FISHER, MOMENTS, SHIFTS, GAP)
MOST_LAYERS = 12  # lines of one panel; evenly spaced ones where there are more


def plot(x: Any) -> Figure:
    """Returns a figure of what was measured: it shows itself in a notebook; else `savefig` it.

    * a log of `biasshift.instrument`, or its table: medians over units along training, a line per
      layer, in a panel for each quantity that was measured;
    * a `UnitFisher`, `ActivationMoments` or `BiasShift`, or a dict of them by layer: a dot per
      unit. Units that are not `UnitFisher.reliable` are hollow;
    * the table of `biasshift.gradient_gap`: a dot per layer.

    Args:
        x: what to draw.

    Raises:
        ValueError: nothing that can be drawn, or nothing was measured.
    """
    with style():
        if isinstance(x, Mapping):
            return _units({str(name): _table(part) for name, part in x.items()})
        table = _table(x)
        return _along(table) if "step" in table else _units({getattr(x, "name", ""): table})


def _table(x: Any) -> pd.DataFrame:
    table = x if isinstance(x, pd.DataFrame) else getattr(x, "table", lambda: None)()
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            "'x' must be a log, a table, a UnitFisher, activation moments or bias shifts, or a "
            f"dict of these, got {type(x).__name__}."
        )
    return table


# -- along training ------------------------------------------------------------------------------


def _along(table: pd.DataFrame) -> Figure:
    if missing := {"step", "layer", "unit"} - {*table}:
        names = ", ".join(sorted(missing))
        raise ValueError(
            f"'x' must have the columns step, layer and unit, got a table without {names}. Give a "
            "log or its table."
        )
    present = {*table.select_dtypes("number").dropna(axis=1, how="all")}
    measured = {column: title for column, title in ALONG.items() if column in present}
    if not measured:
        raise ValueError(f"'x' must have a value of one of {', '.join(ALONG)}, got none.")
    figure, axes = panels(len(measured), rows=1 if len(measured) < 4 else 2, width=2.9, height=2.6)
    for ax, (column, title) in zip(axes, measured.items(), strict=False):
        rows = table.loc[table[column].notna()]
        medians = rows.groupby(["layer", "step"], sort=False, observed=True)[column].median()
        layers = _spread(list(dict.fromkeys(rows["layer"])))
        for layer, look in looks(layers, "layer").items():
            line = medians[layer].sort_index()
            marker = look.marker if len(line) < 2 else ""
            ax.plot(
                line.index, line.to_numpy(), look.line, marker=marker, color=look.color,
                label=escaped(f"layer {layer}"),
            )  # fmt: skip
        ax.set(xlabel="step", ylabel=title)
        ax.legend(ncols=1 + (len(layers) > 6), fontsize=7)
    _hide(axes[len(measured) :])
    return figure


def _spread(layers: list[Any]) -> list[Any]:
    """Not more of them than can be told apart, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[i] for i in np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)]


# -- unit by unit ----------------------------------------------------------------------------------


def _units(tables: Mapping[str, pd.DataFrame]) -> Figure:
    tables = {
        str(name): table
        for outer, found in tables.items()
        for name, table in (
            found.groupby("layer", sort=False) if "layer" in found else [(outer, found)]
        )
    }
    some = next(iter(tables.values()), pd.DataFrame())
    shared = set.intersection(*({*table} for table in tables.values())) if tables else set()
    titles = next((kind for kind in KINDS if {*kind} <= shared), None)
    if titles is None and len(some):
        raise ValueError(
            f"'x' must have the columns {'; or '.join(', '.join(kind) for kind in KINDS)}, got a "
            "table without. Give a log or its table, a UnitFisher, activation moments, bias shifts "
            "or the table of a gradient gap."
        )
    if titles is None:
        raise ValueError("'x' must have measured at least one layer, got none.")
    wide = 2.4 + 0.35 * len(tables)
    figure, axes = panels(len(titles), width=min(wide, 6.0), height=2.8)
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for place, table in enumerate(tables.values()):
            _dots(ax, place, table, column)
        ax.set(ylabel=title, xlim=(-0.6, len(tables) - 0.4))
        names = [escaped(name) for name in tables]
        ax.set_xticks(range(len(tables)), names, rotation=90 if len(tables) > 6 else 0)
        ax.set_xlabel("layer" if any(tables) else f"{len(some)} units")
    return figure


def _dots(ax: Axes, place: int, table: pd.DataFrame, column: str) -> None:
    """One layer's units side by side, and their median; those that can carry a claim are filled."""
    values = table[column].to_numpy(float)
    reliable = (
        table["reliable"].to_numpy(bool) if "reliable" in table else np.ones(len(values), bool)
    )
    across = place + np.linspace(-0.3, 0.3, len(values)) * (len(values) > 1)
    color = next(iter(looks([place], "layer").values())).color
    dots = {"linestyle": "none", "marker": "o", "markersize": 3, "color": color}
    ax.plot(across[reliable], values[reliable], **dots)
    ax.plot(across[~reliable], values[~reliable], **dots, markerfacecolor="white")
    if np.isfinite(values).any():
        ax.hlines(float(np.nanmedian(values)), place - 0.38, place + 0.38, color="0.2", linewidth=1)


def _hide(axes: list[Axes]) -> None:
    for ax in axes:
        ax.set_axis_off()
