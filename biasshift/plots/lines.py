"""Lines along training: a mean over seeds, and its standard deviation as a ribbon; or a median over
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from biasshift.plots.reductions import (
    mean_and_sd_over_seeds,
    median_over_runs,
    median_over_units,
    need,
    with_epochs,
)
from biasshift.plots.theme import between, escaped, legend, looks, on_log_scale

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor


def unit_means(
    ax: Axes,
    table: pd.DataFrame,
    group: str = "activation",
    against: str = "epoch",
    layers: Sequence[str] | None = None,
    line: str | None = None,
) -> Axes:
    """Returns `ax` with the median over all units of their mean activation (figure 2a): mean and SD
    over seeds.

    Args:
        group: one line for each value of this column.
        against: "epoch" or "step".
        layers: only the units of these modules; default: of every module that `mean` was measured
            at.
        line: one line style for all groups, with markers; default: each group's own.
    """
    lines_and_ribbons(ax, _medians(table, "mean", group, against, layers), group, against, line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(ylabel="median over units of\nthe mean activation")
    legend(ax)
    return ax


def coupling(
    ax: Axes,
    table: pd.DataFrame,
    group: str = "activation",
    against: str = "epoch",
    layers: Sequence[str] | None = None,
) -> Axes:
    """Returns `ax` with the median over units of 1/(1 − h), on a log scale; 1 means that bias and
    weights do not interact.

    Mean and SD over seeds are those of the logarithm. `group`, `against` and `layers` as in
    `unit_means`.
    """
    import numpy as np

    need(table, ["coupling"], "the coupling index")
    # The SD belongs to the scale that is drawn, so the logarithm comes first; it leaves a median
    # where it is.
    with np.errstate(divide="ignore"):  # h = 1 in rounding: infinite, and left out of the drawing
        exponent = -np.log10(1 - table["coupling"])
    lines = _medians(table.assign(inflation=exponent), "inflation", group, against, layers)
    lines_and_ribbons(ax, lines, group, against, scale=lambda exponent: 10**exponent)
    ax.set(yscale="log", ylabel="median over units of\nthe variance inflation $1/(1-h)$")
    legend(ax)
    return ax


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
    """Returns `ax` with training (solid) and validation (dotted) curves (figure 2b): mean and SD
    over seeds.

    Args:
        column_train, column_valid: columns of the whole network; None leaves one out.
        log: draw on a log scale, with mean and SD of the logarithm.
        label: what the columns hold, with its unit.
    """
    shown = [(column_train, "-", "training"), (column_valid, ":", "validation")]
    shown = [(column, line, name) for column, line, name in shown if column is not None]
    for column, line, _ in shown:
        curves(ax, table, column, group, against, line, log=log, named=line == shown[0][1])
    for _, line, name in shown:
        ax.plot([], [], line, color="0.4", label=name)
    ax.set(ylabel=label)
    legend(ax)
    return ax


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
    """Returns `ax` with a column of the whole network (a loss, an error): mean and SD over seeds,
    or the median over runs.

    Args:
        line: one line style for all groups, or one for each, with markers; default: each group's
            own.
        log: draw on a log scale, with mean and SD of the logarithm.
        named: whether the groups appear in legends; a second set of lines on the same axes has no
            need to.
    """
    import numpy as np

    need(table, ["layer", group, column], f"curves of '{column}'")
    network = table.loc[table["layer"] == ""]
    rows = with_epochs(network) if against == "epoch" else network
    # Mean and SD belong to the scale that is drawn: below a mean, an SD may reach past 0, where no
    # logarithm is.
    rows = rows.assign(**{column: np.log10(rows[column])}) if log else rows
    reduce = mean_and_sd_over_seeds if middle == "mean" else median_over_runs
    scale = (lambda exponent: 10**exponent) if log else (lambda value: value)
    lines_and_ribbons(
        ax, reduce(rows, column, [group, against]), group, against, line, named, scale
    )
    ax.set(yscale="log" if log else "linear", ylabel=column)
    if log:
        on_log_scale(ax.yaxis)
    return ax


def layer_lines(
    ax: Axes, table: pd.DataFrame, column: str, group: str = "activation", log: bool = False
) -> Axes:
    """Returns `ax` with a column of whole layers against their `number`: mean and SD over seeds, or
    those of the logarithm.
    """
    import numpy as np

    need(table, ["number", group, column], f"'{column}' by layer")
    rows = (
        table.assign(**{column: np.log10(table[column].where(table[column] > 0))}) if log else table
    )
    lines = mean_and_sd_over_seeds(rows, column, [group, "number"])
    lines_and_ribbons(
        ax,
        lines,
        group,
        "number",
        "-",
        scale=(lambda exponent: 10**exponent) if log else (lambda value: value),
    )
    ax.set(xlabel="layer", yscale="log" if log else "linear")
    ax.set_xticks(sorted(table["number"].unique()))
    return ax


def _medians(
    table: pd.DataFrame, column: str, group: str, against: str, layers: Sequence[str] | None
) -> pd.DataFrame:
    need(table, ["step", "layer", "unit", column, group], f"the median of '{column}'")
    rows = with_epochs(table) if against == "epoch" else table
    rows = rows if layers is None else rows.loc[rows["layer"].isin(list(layers))]
    return mean_and_sd_over_seeds(
        median_over_units(rows, column, [group, against]), column, [group, against]
    )


def lines_and_ribbons(
    ax: Axes,
    lines: pd.DataFrame,
    group: str,
    against: str,
    line: str | Mapping[str, str] | None = None,
    named: bool = True,
    scale: Callable[[pd.Series], pd.Series] = lambda values: values,
) -> None:
    """Mean and mean ± SD of each group. `line` overrides the look's own where the line style has
    another meaning.
    """
    for name, look in looks(lines[group].unique(), group).items():
        rows = lines.loc[lines[group] == name]
        x, mean, sd = rows[against], rows["mean"], rows["sd"]
        label = f"{escaped(look.label)} (n = {between(rows['n'].astype(int))})" if named else None
        # Where the line style is taken, markers tell the groups apart in grey print.
        marks = (
            {}
            if line is None and len(rows) > 1
            else {"marker": look.marker, "markevery": max(1, len(rows) // 8)}
        )
        own = line.get(name, "-") if isinstance(line, Mapping) else line or look.line
        ax.plot(x, scale(mean), own, color=look.color, label=label, **marks)
        if sd.notna().any():
            ax.fill_between(
                x, scale(mean - sd), scale(mean + sd), color=look.color, alpha=0.2, linewidth=0
            )
    ax.set(xlabel={"step": "optimizer steps"}.get(against, against))


# -- activation functions ----------------------------------------------------------------------


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
        names: names of `activations.ACTIVATIONS`, or other functions by name.
    """
    import torch

    from biasshift.activations import ACTIVATIONS

    functions = (
        names if isinstance(names, Mapping) else {name: ACTIVATIONS[name]() for name in names}
    )
    x = torch.linspace(-10, 2, 601, dtype=torch.float64)
    for name, look in looks(functions).items():
        ax.plot(
            x.numpy(),
            functions[name](x).detach().numpy(),
            look.line,
            color=look.color,
            label=escaped(look.label),
        )
    ax.set(xlabel="net input $x$", ylabel="activation $f(x)$", xlim=(-10, 2), ylim=(-1.1, 2))
    ax.legend()
    return ax
