"""The figures: `(ax, table) -> ax`. Each is a reduction of the tidy table, then lines or dots on the given axes.

The reductions are pure functions from table to table; whoever doubts a picture can print what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from biasshift.looks import LOOKS, OTHER_LOOKS, Look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


STYLE = {
    "figure.figsize": (5.0, 3.0),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,  # long enough to tell dashes from dots
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def style() -> AbstractContextManager[None]:
    """Returns a context in which figures are made in the project's style: `with style(): fig, ax = plt.subplots()`."""
    import matplotlib

    return matplotlib.rc_context(dict[Any, Any](STYLE))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` axes side by side, known to no pyplot: nothing to close, no backend to choose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.6 * count, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


# -- reductions --------------------------------------------------------------------------------------------------


def with_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with `epoch` in every row, interpolated over the steps of the run's whole-network rows.

    Only those rows carry the epoch. Step 0 is epoch 0; beyond a run's last record its average pace goes on.

    Raises:
        ValueError: a run has no epochs.
    """
    import numpy as np

    _need(table, ["step", "epoch"], "the epochs")
    epoch = table["epoch"].to_numpy(float, copy=True)
    for rows in _rows_by_run(table):
        step = table["step"].to_numpy(float)[rows]
        known = ~np.isnan(epoch[rows])
        marks = dict(sorted({0.0: 0.0, **dict(zip(step[known], epoch[rows][known], strict=True))}.items()))
        x, y = np.array(list(marks)), np.array(list(marks.values()))
        pace = (y[-1] - y[0]) / (x[-1] - x[0]) if len(x) > 1 else np.nan
        between = np.where(step > x[-1], y[-1] + (step - x[-1]) * pace, np.interp(step, x, y))
        epoch[rows] = np.where(known, epoch[rows], between)
    if np.isnan(epoch).any():
        raise ValueError("a run of this table has no rows with an epoch: draw it against='step'")
    return table.assign(epoch=epoch)


def median_over_units(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns one row per run and combination of `keys`: the median of `column` over all units of all layers.

    Raises:
        ValueError: the table is empty, or has no such column, or no unit has a value in it.
    """
    _need(table, ["unit", column, *keys], f"the median of '{column}'")
    units = table.loc[(table["unit"] >= 0) & table[column].notna()]
    _need(units, [], f"the median of '{column}' over units")
    return units.groupby([*keys, *_of_run(table, keys)], observed=True, sort=True)[column].median().reset_index()


def mean_and_sd_over_seeds(table: pd.DataFrame, column: str, keys: Sequence[str]) -> pd.DataFrame:
    """Returns one row per combination of `keys`: mean and standard deviation (n − 1) of `column`, and n, the runs.

    Raises:
        ValueError: nothing to average, or runs of different settings would be averaged (one seed comes twice).
    """
    _need(table, [column, *keys], f"the mean of '{column}'")
    rows = table.loc[table[column].notna()]
    _need(rows, [], f"the mean of '{column}'")
    run = [name for name in ("seed", "run") if name in rows and len(rows[name].dropna()) == len(rows)][:1]
    twice = rows.loc[rows.duplicated([*keys, *run])]
    if len(twice):
        where = ", ".join(f"{key} = {twice.iloc[0][key]}" for key in [*keys, *run])
        raise ValueError(f"two values of '{column}' at {where}: keep one setting of the runs, and one row per run and step")
    found = rows.groupby(list(keys), observed=True, sort=True)[column].agg(mean="mean", sd="std", n="size")
    return found.reset_index()


def gap_points(table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False) -> pd.DataFrame:
    """Returns one row per run, layer and step: `mean_in_abs`, and `degrees`, the angle between the two gradients.

    Args:
        layers: keep these only.
        skip_input: leave out the first layer of each run, whose incoming activations are the data.
    """
    import numpy as np

    _need(table, ["step", "layer", "unit", "mean_in_abs", "cos_gradient"], "the gradient gap")
    rows = table.loc[(table["unit"] == -1) & table["mean_in_abs"].notna()]
    if skip_input:
        first = np.zeros(len(rows), bool)
        for run in _rows_by_run(rows):
            names = rows["layer"].to_numpy(object)[run]
            first[run] = names == names[0]
        rows = rows.loc[~first]
    if layers is not None:
        rows = rows.loc[rows["layer"].isin(list(layers))]
    rows = rows.loc[rows["cos_gradient"].notna()]
    _need(rows, [], "the gradient gap of these layers")
    return rows.assign(degrees=np.degrees(np.arccos(rows["cos_gradient"].clip(-1, 1))))


def _need(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    if missing := [name for name in columns if name not in table]:
        hint = "; a log's own table gets it with table.assign(...)" if missing[0] in ("activation", "seed", "run") else ""
        raise ValueError(f"{what} needs a column '{missing[0]}', which the table lacks{hint}")
    if len(table) == 0:
        raise ValueError(f"{what} needs rows, and the table has none: were these quantities measured, or filtered away?")


def _of_run(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    return [name for name in ("run", "seed") if name in table and name not in keys and len(table[name].dropna()) == len(table)]


def _rows_by_run(table: pd.DataFrame) -> list:
    """Row positions of each run; a table without `run` is one run."""
    import numpy as np

    if "run" not in table:
        return [np.arange(len(table))]
    return list(table.groupby("run", observed=True, sort=False).indices.values())


# -- drawing -----------------------------------------------------------------------------------------------------


def activation_functions(
    ax: Axes, names: Sequence[str] | Mapping[str, Callable[[Tensor], Tensor]] = ("elu", "lrelu", "relu", "srelu")
) -> Axes:
    """Returns `ax` with activation functions over x from −10 to 2 (figure 1).

    Args:
        names: names of `activations.ACTIVATIONS`, or other functions by name.
    """
    import torch

    from biasshift.activations import ACTIVATIONS

    functions = names if isinstance(names, Mapping) else {name: ACTIVATIONS[name]() for name in names}
    x = torch.linspace(-10, 2, 601, dtype=torch.float64)
    for name, look in _looks(functions).items():
        ax.plot(x.numpy(), functions[name](x).detach().numpy(), look.line, color=look.color, label=look.label)
    ax.set(xlabel="net input $x$", ylabel="activation $f(x)$", xlim=(-10, 2), ylim=(-1.1, 2))
    ax.legend()
    return ax


def unit_means(
    ax: Axes,
    table: pd.DataFrame,
    group: str = "activation",
    against: str = "epoch",
    layers: Sequence[str] | None = None,
    line: str | None = None,
) -> Axes:
    """Returns `ax` with the median over all units of their mean activation (figure 2a): mean and SD over seeds.

    Args:
        group: one line for each value of this column.
        against: "epoch" or "step".
        layers: only the units of these modules; default: of every module that `mean` was measured at.
        line: one line style for all groups, with markers; default: each group's own.
    """
    _lines_and_ribbons(ax, _medians(table, "mean", group, against, layers), group, against, line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(ylabel="median over units of\nthe mean activation")
    _legend(ax)
    return ax


def coupling(ax: Axes, table: pd.DataFrame, group: str = "activation", against: str = "epoch", layers: Sequence[str] | None = None) -> Axes:
    """Returns `ax` with the median over units of 1/(1 − h), on a log scale; 1 means that bias and weights do not interact.

    Mean and SD over seeds are those of the logarithm. `group`, `against` and `layers` as in `unit_means`.
    """
    import numpy as np

    _need(table, ["coupling"], "the coupling index")
    # The SD belongs to the scale that is drawn, so the logarithm comes first; it leaves a median where it is.
    with np.errstate(divide="ignore"):  # h = 1 in rounding: infinite, and left out of the drawing
        exponent = -np.log10(1 - table["coupling"])
    lines = _medians(table.assign(inflation=exponent), "inflation", group, against, layers)
    _lines_and_ribbons(ax, lines, group, against, scale=lambda exponent: 10**exponent)
    ax.set(yscale="log", ylabel="median over units of\nthe variance inflation $1/(1-h)$")
    _legend(ax)
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
    """Returns `ax` with training (solid) and validation (dotted) curves (figure 2b): mean and SD over seeds.

    Args:
        column_train, column_valid: columns of the whole network; None leaves one out.
        log: draw on a log scale, with mean and SD of the logarithm.
        label: what the columns hold, with its unit.
    """
    import numpy as np

    shown = [(column_train, "-", "training"), (column_valid, ":", "validation")]
    shown = [(column, line, name) for column, line, name in shown if column is not None]
    for column, line, _ in shown:
        _need(table, ["layer", group, column], "the learning curves")
        network = table.loc[table["layer"] == ""]
        rows = with_epochs(network) if against == "epoch" else network
        # Mean and SD belong to the scale that is drawn: below a mean, an SD may reach past 0, where no logarithm is.
        rows = rows.assign(**{column: np.log10(rows[column])}) if log else rows
        lines = mean_and_sd_over_seeds(rows, column, [group, against])
        scale = (lambda exponent: 10**exponent) if log else (lambda value: value)
        _lines_and_ribbons(ax, lines, group, against, line=line, named=line == shown[0][1], scale=scale)
    for _, line, name in shown:
        ax.plot([], [], line, color="0.4", label=name)
    ax.set(ylabel=label, yscale="log" if log else "linear")
    _legend(ax)
    return ax


def gap_against_mean(
    ax: Axes, table: pd.DataFrame, layers: Sequence[str] | None = None, skip_input: bool = False, group: str = "activation"
) -> Axes:
    """Returns `ax` with the gradient gap against the mean incoming activation, a dot per run, layer and step.

    The larger marker of each group is at its medians. `layers` and `skip_input` as in `gap_points`.
    """
    _need(table, [group], "the gradient gap")
    points = gap_points(table, layers, skip_input)
    for name, look in _looks(points[group].unique(), group).items():
        dots = points.loc[points[group] == name]
        x, y = dots["mean_in_abs"], dots["degrees"]
        ax.scatter(x, y, s=9, alpha=0.3, color=look.color, marker=look.marker, linewidths=0, rasterized=True)
        runs = dots["run"].nunique() if "run" in dots else 1
        big = {"s": 80, "color": look.color, "marker": look.marker, "edgecolors": "white", "linewidths": 1.2, "zorder": 3}
        ax.scatter([x.median()], [y.median()], label=f"{look.label} (n = {runs})", **big)
    ax.set(xlabel="incoming activations: mean over inputs of $|E_p(a)|$")
    ax.set(ylabel="angle between gradient and\nunit natural gradient (degrees)")
    _legend(ax)
    return ax


def _medians(table: pd.DataFrame, column: str, group: str, against: str, layers: Sequence[str] | None) -> pd.DataFrame:
    _need(table, ["step", "layer", "unit", column, group], f"the median of '{column}'")
    rows = with_epochs(table) if against == "epoch" else table
    rows = rows if layers is None else rows.loc[rows["layer"].isin(list(layers))]
    return mean_and_sd_over_seeds(median_over_units(rows, column, [group, against]), column, [group, against])


def _lines_and_ribbons(
    ax: Axes,
    lines: pd.DataFrame,
    group: str,
    against: str,
    line: str | None = None,
    named: bool = True,
    scale: Callable[[pd.Series], pd.Series] = lambda values: values,
) -> None:
    """Mean and mean ± SD of each group. `line` overrides the look's own where the line style has another meaning."""
    for name, look in _looks(lines[group].unique(), group).items():
        rows = lines.loc[lines[group] == name]
        x, mean, sd = rows[against], rows["mean"], rows["sd"]
        least, most = rows["n"].min(), rows["n"].max()
        label = f"{look.label} (n = {most if least == most else f'{least}–{most}'})" if named else None
        # Where the line style is taken, markers tell the groups apart in grey print.
        marks = {} if line is None else {"marker": look.marker, "markevery": max(1, len(rows) // 8)}
        ax.plot(x, scale(mean), line or look.line, color=look.color, label=label, **marks)
        if sd.notna().any():
            ax.fill_between(x, scale(mean - sd), scale(mean + sd), color=look.color, alpha=0.2, linewidth=0)
    ax.set(xlabel={"step": "optimizer steps"}.get(against, against))


def _legend(ax: Axes) -> None:
    # Beside the axes: between ribbons that fill them there is often no free corner.
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)


def _looks(names: Iterable, group: str = "activation") -> dict[Any, Look]:
    """A look for each name: the activations' own, in a fixed order, or the others in order of appearance."""
    names = list(names)
    looks = {name: look for name, look in LOOKS.items() if name in names} if group == "activation" else {}
    for name in names:
        if name not in looks:
            color, marker, line = OTHER_LOOKS[(len(looks) - len(looks.keys() & LOOKS)) % len(OTHER_LOOKS)]
            looks[name] = Look(str(name) if group == "activation" else f"{group} = {name}", color, marker, line)
    return looks
