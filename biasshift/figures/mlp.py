"""Figures 1, 2, 3 and 7: activation functions, MNIST networks and autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.analysis.per_run import FEWEST_MEASUREMENTS
from biasshift.figures.captions import described, over_seeds
from biasshift.figures.selection import MEASURED, kept, with_settings
from biasshift.figures.spec import NONE_PRINTED, Drawing, Number, finals

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

ERROR = "squared error per pixel"


def figure1(table: pd.DataFrame | None = None) -> Figure:
    """The four activation functions (the paper's Figure 1). Needs no runs."""
    figure, (ax,) = plots.panels(1)
    plots.activation_functions(ax)
    return figure


def means_and_losses(table: pd.DataFrame) -> pd.DataFrame:
    """The losses of every run, and the median over all hidden units of their mean activation: as
    one unit named "hidden".
    """
    for name in ("train_loss", "valid_loss", "mean"):
        plots.need(table, [name], "the figure")
    medians = plots.median_over_units(table, "mean", ["step"]).drop(columns="seed", errors="ignore")
    hidden = with_settings(medians.assign(layer="hidden", unit=0), table)
    network = kept(
        table.loc[(table["layer"] == "") & table["epoch"].notna()],
        ["epoch", "train_loss", "valid_loss"],
    )
    return _stacked([network, hidden])


def figure2(table: pd.DataFrame) -> Figure:
    """Mean unit activations, and training and validation loss, against the epoch (the paper's
    Figure 2).
    """
    figure, (means, losses) = plots.panels(2)
    plots.unit_means(means, table, line="-")
    plots.learning_curves(losses, table, log=True)
    plots.no_legend(means)  # the same colors and markers as beside it
    plots.lettered(
        [means, losses],
        [
            over_seeds(table, "mean ± SD over seeds"),
            over_seeds(table, "mean ± SD of the logarithm"),
        ],
    )
    plots.headed(figure, described(table))
    return figure


def numbers2(table: pd.DataFrame) -> list[Number]:
    """Medians of the units' means and losses at the end. The paper prints no number for its Figure
    2.
    """
    return [
        *finals(table, "mean", NONE_PRINTED, "median unit activation at the end"),
        *finals(table, "train_loss", NONE_PRINTED, "training loss at the end"),
        *finals(table, "valid_loss", NONE_PRINTED, "validation loss at the end"),
    ]


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """The reconstruction errors of every run."""
    plots.need(table, ["train_error", "test_error", "lr", "epoch"], "figure 3")
    return kept(
        table.loc[(table["layer"] == "") & table["test_error"].notna()],
        ["epoch", "train_error", "test_error"],
    )


def figure3(table: pd.DataFrame) -> Figure:
    """Reconstruction error of autoencoders on training and test images: a panel for each and every
    learning rate (Figure 3).
    """
    rates = sorted(table["lr"].dropna().unique(), reverse=True)
    figure, axes = plots.panels(2 * len(rates), rows=2, width=2.3, height=2.4, share_y="row")
    for row, (column, name) in enumerate((("train_error", "training"), ("test_error", "test"))):
        for number, rate in enumerate(rates):
            ax = axes[row * len(rates) + number]
            plots.curves(
                ax,
                table.loc[table["lr"] == rate],
                column,
                against="epoch",
                log=True,
                middle="median",
            )
            ax.set(ylabel="" if number else f"{name} error", xlabel=ax.get_xlabel() if row else "")
            ax.set_title(f"learning rate {rate:g}" if not row else "")
    plots.one_legend(figure, axes)
    plots.headed(
        figure,
        f"Reconstruction error ({ERROR}), "
        f"{over_seeds(table, 'medians over runs')}\n{described(table)}",
    )
    return figure


def numbers3(table: pd.DataFrame) -> list[Number]:
    """Errors at the end, rate by rate. The paper prints none."""
    return [
        number._replace(quantity=f"{number.quantity}, learning rate {rate:g}")
        for rate in sorted(table["lr"].dropna().unique(), reverse=True)
        for number in finals(
            table.loc[table["lr"] == rate], "test_error", NONE_PRINTED, "test error at the end"
        )
    ]


def variances(table: pd.DataFrame) -> pd.DataFrame:
    """How much activations vary along training: one row per hidden unit, and one per layer (unit
    −1).

    Of a unit: the variance over epochs of its mean activation on the probe. Of a layer: that of the
    median over its units. The paper's text, "variance of the median activation of each hidden
    unit", bears both readings; medians over examples are not recorded. Step 0 is left out: the
    networks have not been trained then.
    """
    plots.need(table, ["mean", "activation"], "figure 7")
    rows = table.loc[(table["unit"] >= 0) & table["mean"].notna() & (table["step"] > 0)]
    plots.need(rows, [], "figure 7")
    if (fewest := rows.groupby("run", observed=True)["step"].nunique().min()) < FEWEST_MEASUREMENTS:
        raise ValueError(
            f"A variance over epochs needs {FEWEST_MEASUREMENTS} measurements after step 0, and a "
            f"run has {fewest}: train it longer."
        )
    rows = rows[["run", "step", "layer", "unit", "mean"]].astype(
        {"run": object, "layer": object, "mean": float}
    )
    units = (
        rows.groupby(["run", "layer", "unit"], sort=False)["mean"]
        .var()
        .reset_index(name="variance")
    )
    medians = rows.groupby(["run", "layer", "step"], sort=False)["mean"].median()
    layers = (
        medians.groupby(["run", "layer"], sort=False)
        .var()
        .reset_index(name="variance")
        .assign(unit=-1)
    )
    found = _stacked([units, layers])
    number = found.groupby("run")["layer"].transform(lambda names: names.factorize()[0] + 1)
    return with_settings(found.assign(number=number, step=0), table)


def figure7(table: pd.DataFrame) -> Figure:
    """Variance over epochs of the activation of hidden units, layer by layer (Figure 7, in the
    appendix).
    """
    figure, (left, right) = plots.panels(2)
    units = table.loc[table["unit"] >= 0]
    groups = units.groupby(["number", "activation"], observed=True)
    spans = (
        groups["variance"]
        .quantile([0.25, 0.5, 0.75])
        .unstack()
        .set_axis(["low", "mean", "high"], axis=1)
    )
    plots.spans(left, spans.assign(n=groups["run"].nunique()).reset_index(), at="number")
    left.set(
        yscale="log",
        xlabel="hidden layer",
        ylabel="variance over epochs of\na unit's mean activation",
    )
    plots.layer_lines(right, table.loc[table["unit"] == -1], "variance", log=True)
    right.set(xlabel="hidden layer", ylabel="variance over epochs of the\nmedian over units")
    plots.lettered(
        [left, right],
        [
            "units: median and quartiles",
            f"layers: {over_seeds(table, 'mean ± SD of the logarithm')}",
        ],
    )
    plots.one_legend(figure, [left])
    plots.no_legend(right)
    plots.headed(figure, described(table))
    return figure


def numbers7(table: pd.DataFrame) -> list[Number]:
    """The median of the variances over all hidden units."""
    units = table.loc[table["unit"] >= 0]
    found = {
        look.label: units.loc[units["activation"] == name]
        for name, look in plots.looks(units["activation"].unique()).items()
    }
    return [
        Number(
            f"variance of a unit's mean activation, median over units, {name}",
            f"{rows['variance'].median():.2g} (n = {rows['run'].nunique()})", NONE_PRINTED,
        )
        for name, rows in found.items()
    ]  # fmt: skip


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; columns that one of them lacks are NaN there."""
    import pandas as pd

    return pd.concat(
        [table.astype({"layer": object, "run": object}) for table in tables], ignore_index=True
    )


UNSHOWN = tuple(name for name in MEASURED if name not in ("probe_size", "means_every"))
PLAIN = {"update": "plain", "constant": 0.0}
FIGURES = {
    "1": Drawing("The activation "
                 "functions", "", "", lambda table: table, figure1, lambda table: []),
    "2": Drawing(
        "Mean unit activations and learning curves of fully connected networks",
        "biasshift train mnist", "MNIST, 8 × 128, 300 epochs, 5 runs; it prints no numbers, and "
                                 "the means are flat after epoch 25",
        means_and_losses, figure2, numbers2, ("mnist", "digits"), {"depth": 8, "width": 128, **PLAIN},
        ("train mnist --epochs 2 --seeds 2 --exam-probe 2000",), unshown=UNSHOWN,
    ),
    "3": Drawing(
        "Autoencoders: reconstruction error", "biasshift train autoencoder", "MNIST, 500 epochs, "
                                                                             "several runs; it "
                                                                             "prints no numbers",
        errors, figure3, numbers3, ("autoencoder",), {}, ("train autoencoder --epochs 1 --seeds 1 "
                                                          "--instrument activations",),
        apart=("lr",),
    ),
    "7": Drawing(
        "Variance over epochs of the activations of hidden units",
        "biasshift train mnist --depth 5 --width 256 --epochs 200 --activation elu relu",
        "MNIST, 5 × 256, 200 epochs; it prints no numbers",
        variances, figure7, numbers7, ("mnist", "digits"), {"depth": 5, "width": 256, **PLAIN},
        ("train mnist --depth 5 --width 256 --epochs 3 --seeds 1 --activation elu relu "
         "--fisher-every 0 --exam-probe 2000",),
        unshown=UNSHOWN,
    ),
}  # fmt: skip
