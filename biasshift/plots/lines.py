"""Lines: activation functions over their input, and quantities along training.

Along training, a line is a mean over seeds with its standard deviation as a ribbon, or a median
over runs. Mean and SD belong to the scale that is drawn. On a log scale they are those of the
logarithm: below a mean, an SD may reach past 0, where there is no logarithm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from biasshift.activations import constructor
from biasshift.plots.reductions import (
    mean_and_sd_over_seeds,
    median_over_runs,
    median_over_units,
    need,
    with_epochs,
)
from biasshift.plots.theme import between, escaped, legend, looks, on_log_scale

# From the scale that means and SDs are taken on to the values that are drawn.
_SCALES = {"linear": lambda value: value, "log": lambda exponent: 10**exponent}


def activation_functions(
    ax: Axes,
    names: Sequence[str] | Mapping[str, Callable[[Tensor], Tensor]] = (
        "elu",
        "lrelu",
        "relu",
        "srelu",
    ),
) -> Axes:
    """Returns `ax` with activation functions over x from −10 to 2 (figure 1).

    Args:
        names: names of `biasshift.activations.ACTIVATIONS`, ``elu:α`` and ``lrelu:slope``, or any
            functions by name. They get a float64 tensor of shape (601,).

    Raises:
        ValueError: an unknown name, or an import path, which nothing here follows.
    """
    functions = (
        names
        if isinstance(names, Mapping)
        else {name: constructor(name)().double() for name in names}
    )
    x = torch.linspace(-10, 2, 601, dtype=torch.float64)
    for name, look in looks(functions).items():
        y = functions[name](x).detach().numpy()
        ax.plot(x.numpy(), y, look.line, color=look.color, label=escaped(look.label))
    ax.set(xlabel="net input $x$", ylabel="activation $f(x)$", xlim=(-10, 2), ylim=(-1.1, 2))
    ax.legend()
    return ax


# -- units -------------------------------------------------------------------------------------


def unit_means(
    ax: Axes,
    table: pd.DataFrame,
    group: str = "activation",
    against: str = "epoch",
    layers: Sequence[str] | None = None,
    line: str | None = None,
) -> Axes:
    """Returns `ax` with the median over all units of their mean activation (figure 2a).

    Lines are means over seeds, ribbons reach one SD above and below.

    Args:
        group: one line for each value of this column.
        against: "epoch" or "step".
        layers: only the units of these modules; default: of every module that `mean` was measured
            at.
        line: one line style for all groups, with markers; default: each group's own.

    Raises:
        ValueError: the table is empty or lacks a column, or runs of two settings would be averaged.
    """
    lines_and_ribbons(ax, _medians(table, "mean", group, against, layers), group, against, line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(ylabel="median over units of\nthe mean activation")
    return legend(ax)


def coupling(
    ax: Axes,
    table: pd.DataFrame,
    group: str = "activation",
    against: str = "epoch",
    layers: Sequence[str] | None = None,
) -> Axes:
    """Returns `ax` with the median over units of 1/(1 − h), on a log scale.

    h is the coupling index of bias and weights: at 1/(1 − h) = 1 they do not interact. Mean and SD
    over seeds are those of the logarithm. `group`, `against` and `layers` as in `unit_means`.

    Raises:
        ValueError: the table is empty or lacks a column, or runs of two settings would be averaged.
    """
    need(table, ["coupling"], "the coupling index")
    # The logarithm comes before the median, which it leaves where it is.
    with np.errstate(divide="ignore"):  # h = 1 in rounding: infinite, and left out of the drawing
        exponent = -np.log10(1 - table["coupling"])
    lines = _medians(table.assign(inflation=exponent), "inflation", group, against, layers)
    lines_and_ribbons(ax, lines, group, against, scale=_SCALES["log"])
    ax.set(yscale="log", ylabel="median over units of\nthe variance inflation $1/(1-h)$")
    return legend(ax)


def _medians(
    table: pd.DataFrame, column: str, group: str, against: str, layers: Sequence[str] | None
) -> pd.DataFrame:
    need(table, ["step", "layer", "unit", column, group], f"the median of '{column}'")
    rows = with_epochs(table) if against == "epoch" else table
    rows = rows if layers is None else rows.loc[rows["layer"].isin(list(layers))]
    medians = median_over_units(rows, column, [group, against])
    return mean_and_sd_over_seeds(medians, column, [group, against])


# -- networks and layers -----------------------------------------------------------------------


def learning_curves(
    ax: Axes,
    table: pd.DataFrame,
    column_train: str | None = "train_loss",
    column_valid: str | None = "valid_loss",
    group: str = "activation",
    against: str = "epoch",
    log: bool = False,
    label: str = "cross-entropy (nats)",
) -> Axes:
    """Returns `ax` with training (solid) and validation (dotted) curves (figure 2b).

    Lines are means over seeds, ribbons reach one SD above and below. The legend names every group
    once, and the two line styles.

    Args:
        column_train, column_valid: columns of the whole network; None leaves one out.
        group, against: as in `unit_means`.
        log: draw on a log scale, with mean and SD of the logarithm.
        label: what the columns hold, with its unit.

    Raises:
        ValueError: the table is empty or lacks a column, or runs of two settings would be averaged.
    """
    shown = [(column_train, "-", "training"), (column_valid, ":", "validation")]
    shown = [(column, line, name) for column, line, name in shown if column is not None]
    for column, line, _ in shown:
        curves(ax, table, column, group, against, line, log=log, named=line == shown[0][1])
    for _, line, name in shown:
        ax.plot([], [], line, color="0.4", label=name)
    ax.set(ylabel=label)
    return legend(ax)


def curves(
    ax: Axes,
    table: pd.DataFrame,
    column: str,
    group: str = "activation",
    against: str = "step",
    line: str | Mapping[str, str] | None = None,
    log: bool = False,
    named: bool = True,
    middle: Literal["mean", "median"] = "mean",
) -> Axes:
    """Returns `ax` with a column of the whole network, such as a loss or an error.

    Lines are means over seeds with ribbons of one SD, or medians over runs without ribbons.

    Args:
        group, against: as in `unit_means`.
        line: one line style for all groups, or one for each, with markers; default: each group's
            own.
        log: draw on a log scale, with mean and SD of the logarithm.
        named: whether the groups appear in legends; a second set of lines on the same axes has no
            need to.
        middle: "mean" or "median".

    Raises:
        ValueError: the table is empty or lacks a column, or runs of two settings would be averaged.
    """
    need(table, ["layer", group, column], f"curves of '{column}'")
    network = table.loc[table["layer"] == ""]
    rows = with_epochs(network) if against == "epoch" else network
    reduce = mean_and_sd_over_seeds if middle == "mean" else median_over_runs
    _reduced(ax, rows, column, group, against, line, log, named, reduce)
    ax.set(ylabel=column)
    if log:
        on_log_scale(ax.yaxis)
    return ax


def layer_lines(
    ax: Axes, table: pd.DataFrame, column: str, group: str = "activation", log: bool = False
) -> Axes:
    """Returns `ax` with a column of whole layers against the layer's `number`.

    Lines are means over seeds with ribbons of one SD; on a log scale (`log`) they are those of the
    logarithm, and values that have none are left out.

    Args:
        table: one row per run and layer, with a column `number`.

    Raises:
        ValueError: the table is empty or lacks a column, or runs of two settings would be averaged.
    """
    need(table, ["number", group, column], f"'{column}' by layer")
    rows = table.assign(**{column: table[column].where(table[column] > 0)}) if log else table
    _reduced(ax, rows, column, group, "number", "-", log)
    ax.set(xlabel="layer", xticks=sorted(table["number"].unique()))
    return ax


def _reduced(
    ax: Axes,
    rows: pd.DataFrame,
    column: str,
    group: str,
    against: str,
    line: str | Mapping[str, str] | None,
    log: bool,
    named: bool = True,
    reduce: Callable[..., pd.DataFrame] = mean_and_sd_over_seeds,
) -> None:
    """Draws a column reduced over runs, on the scale that it was reduced on."""
    scale = "log" if log else "linear"
    values = rows.assign(**{column: np.log10(rows[column])}) if log else rows
    lines = reduce(values, column, [group, against])
    lines_and_ribbons(ax, lines, group, against, line, named, _SCALES[scale])
    ax.set(yscale=scale)


def lines_and_ribbons(
    ax: Axes,
    lines: pd.DataFrame,
    group: str,
    against: str,
    line: str | Mapping[str, str] | None = None,
    named: bool = True,
    scale: Callable[[pd.Series], pd.Series] = _SCALES["linear"],
) -> None:
    """Draws the mean of each group as a line, and mean ± SD as a ribbon around it.

    Where the line style has another meaning than the group, or a group has one point only, markers
    tell the groups from each other.

    Args:
        lines: columns `mean`, `sd` and `n`, as `mean_and_sd_over_seeds` returns them.
        line: the line style of all groups, or of each; default: that of the group's look.
        named: whether the groups get a label with their n.
        scale: from means and SDs to what is drawn, for example back from the logarithm.
    """
    for name, look in looks(lines[group].unique(), group).items():
        rows = lines.loc[lines[group] == name]
        x, mean, sd = rows[against], rows["mean"], rows["sd"]
        label = f"{escaped(look.label)} (n = {between(rows['n'].astype(int))})" if named else None
        own = line.get(name, "-") if isinstance(line, Mapping) else line or look.line
        drawn = {"color": look.color, "label": label}
        if line is not None or len(rows) <= 1:
            drawn |= {"marker": look.marker, "markevery": max(1, len(rows) // 8)}
        ax.plot(x, scale(mean), own, **drawn)
        if sd.notna().any():
            low, high = scale(mean - sd), scale(mean + sd)
            ax.fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
    ax.set(xlabel={"step": "optimizer steps"}.get(against, against))
