"""Figures 1, 2, 3 and 7: activation functions, MNIST networks and autoencoders."""

import pandas as pd

from biasshift import plots
from biasshift.analysis.quantities import FEWEST_MEASUREMENTS
from biasshift.figures.captions import described, finish, over_seeds
from biasshift.figures.selection import MEASURED, kept, with_settings
from biasshift.figures.spec import NONE_PRINTED, FigureSpec, Number, by_activation, final_values

ERROR = "squared error per pixel"
PLAIN = {"update": "plain", "constant": 0.0}


def figure1(table: pd.DataFrame | None = None) -> plots.Figure:
    """Returns the four activation functions (the paper's Figure 1). It needs no runs."""
    figure, (ax,) = plots.panels(1)
    plots.activation_functions(ax)
    return figure


# -- Figure 2: MNIST, 8 × 128 ------------------------------------------------------------------


def means_and_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the losses of every run, and the median over all hidden units of their mean.

    Losses stand in rows of the whole network, one per epoch. The medians stand in rows of a layer
    named "hidden" with one unit, as if that were all of the network.
    """
    plots.need(table, ["train_loss", "valid_loss", "mean"], "the figure")
    medians = plots.median_over_units(table, "mean", ["step"]).drop(columns="seed", errors="ignore")
    hidden = with_settings(medians.assign(layer="hidden", unit=0), table)
    network = table.loc[(table["layer"] == "") & table["epoch"].notna()]
    return _stacked([kept(network, ["epoch", "train_loss", "valid_loss"]), hidden])


def figure2(table: pd.DataFrame) -> plots.Figure:
    """Returns mean unit activations, and training and validation loss, against the epoch.

    It is the paper's Figure 2. The losses have a logarithmic scale.
    """
    figure, (means, losses) = plots.panels(2)
    plots.unit_means(means, table, line="-")
    plots.learning_curves(losses, table, log=True)
    plots.no_legend(means)  # the same colors and markers as beside it
    texts = ("mean ± SD over seeds", "mean ± SD of the logarithm")
    plots.lettered([means, losses], [over_seeds(table, text) for text in texts])
    plots.headed(figure, described(table))
    return figure


def numbers2(table: pd.DataFrame) -> list[Number]:
    """Returns medians of the units' means and losses at the end; the paper prints none of them."""
    return [
        *final_values(table, "mean", NONE_PRINTED, "median unit activation at the end"),
        *final_values(table, "train_loss", NONE_PRINTED, "training loss at the end"),
        *final_values(table, "valid_loss", NONE_PRINTED, "validation loss at the end"),
    ]


# -- Figure 3: autoencoders --------------------------------------------------------------------


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the reconstruction errors of every run on training and test images, by epoch.

    They are squared errors per pixel. Runs differ in their learning rate `lr`.
    """
    plots.need(table, ["train_error", "test_error", "lr", "epoch"], "figure 3")
    scored = table.loc[(table["layer"] == "") & table["test_error"].notna()]
    return kept(scored, ["epoch", "train_error", "test_error"])


def figure3(table: pd.DataFrame) -> plots.Figure:
    """Returns the reconstruction errors of autoencoders (Figure 3).

    There is a column of panels for every learning rate, the largest first. The upper row is of
    training images, the lower one of test images; lines are medians over runs.
    """
    rates = _rates(table)
    figure, axes = plots.panels(2 * len(rates), rows=2, width=2.3, height=2.4, share_y="row")
    for row, (images, column) in enumerate((("training", "train_error"), ("test", "test_error"))):
        for number, rate in enumerate(rates):
            ax, rows = axes[row * len(rates) + number], table.loc[table["lr"] == rate]
            plots.curves(ax, rows, column, against="epoch", log=True, middle="median")
            ax.set(
                ylabel="" if number else f"{images} error",
                xlabel=ax.get_xlabel() if row else "",
                title="" if row else f"learning rate {rate:g}",
            )
    plots.one_legend(figure, axes)
    plots.headed(
        figure,
        f"Reconstruction error ({ERROR}), "
        f"{over_seeds(table, 'medians over runs')}\n{described(table)}",
    )
    return figure


def numbers3(table: pd.DataFrame) -> list[Number]:
    """Returns the test errors at the end, rate by rate; the paper prints none of them."""
    return [
        number._replace(quantity=f"{number.quantity}, learning rate {rate:g}")
        for rate in _rates(table)
        for number in final_values(
            table.loc[table["lr"] == rate], "test_error", NONE_PRINTED, "test error at the end"
        )
    ]


def _rates(table: pd.DataFrame) -> list[float]:
    return sorted(table["lr"].dropna().unique(), reverse=True)


# -- Figure 7: MNIST, 5 × 256 ------------------------------------------------------------------


def variances(table: pd.DataFrame) -> pd.DataFrame:
    """Returns how much activations vary along training: a row per hidden unit, and per layer.

    `variance` of a unit: that of its mean activation on the probe, over epochs. Of a layer, in a
    row with unit −1: that of the median over its units. The paper's text, "variance of the median
    activation of each hidden unit", bears both readings; medians over examples are not recorded.
    Step 0 is left out: the networks have not been trained then. `number` counts layers from 1.

    Raises:
        ValueError: a run has fewer than three measurements after step 0.
    """
    plots.need(table, ["mean", "activation"], "figure 7")
    rows = table.loc[(table["unit"] >= 0) & table["mean"].notna() & (table["step"] > 0)]
    plots.need(rows, [], "figure 7")
    if (fewest := rows.groupby("run", observed=True)["step"].nunique().min()) < FEWEST_MEASUREMENTS:
        raise ValueError(
            f"A variance over epochs needs {FEWEST_MEASUREMENTS} measurements after step 0, and a "
            f"run has {fewest}. Train it longer."
        )
    rows = rows[["run", "step", "layer", "unit", "mean"]].astype(
        {"run": object, "layer": object, "mean": float}
    )
    units = rows.groupby(["run", "layer", "unit"], sort=False)["mean"].var()
    medians = rows.groupby(["run", "layer", "step"], sort=False)["mean"].median()
    layers = medians.groupby(["run", "layer"], sort=False).var()
    both = _stacked(
        [units.reset_index(name="variance"), layers.reset_index(name="variance").assign(unit=-1)]
    )
    number = both.groupby("run")["layer"].transform(lambda names: names.factorize()[0] + 1)
    return with_settings(both.assign(number=number, step=0), table)


def figure7(table: pd.DataFrame) -> plots.Figure:
    """Returns the variance over epochs of the activation of hidden units, layer by layer.

    It is Figure 7 of the paper's appendix. The left panel shows the median and the quartiles of the
    variances of units, the right one the variance of the median unit.
    """
    figure, (left, right) = plots.panels(2)
    groups = table.loc[table["unit"] >= 0].groupby(["number", "activation"], observed=True)
    quartiles = groups["variance"].quantile([0.25, 0.5, 0.75]).unstack()
    quartiles = quartiles.set_axis(["low", "mean", "high"], axis=1)
    plots.spans(left, quartiles.assign(n=groups["run"].nunique()).reset_index(), at="number")
    left.set(
        yscale="log",
        xlabel="hidden layer",
        ylabel="variance over epochs of\na unit's mean activation",
    )
    plots.layer_lines(right, table.loc[table["unit"] == -1], "variance", log=True)
    right.set(xlabel="hidden layer", ylabel="variance over epochs of the\nmedian over units")
    layers = f"layers: {over_seeds(table, 'mean ± SD of the logarithm')}"
    letters = ["units: median and quartiles", layers]
    return finish(figure, [left, right], letters, described(table), named=[left])


def numbers7(table: pd.DataFrame) -> list[Number]:
    """Returns the median of the variances over all hidden units, for every activation function."""
    return [
        Number(
            f"variance of a unit's mean activation, median over units, {label}",
            f"{rows['variance'].median():.2g} (n = {rows['run'].nunique()})",
            NONE_PRINTED,
        )
        for _, label, rows in by_activation(table.loc[table["unit"] >= 0])
    ]


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; columns that one of them lacks are NaN there."""
    return pd.concat(
        [table.astype({"layer": object, "run": object}) for table in tables], ignore_index=True
    )


IRRELEVANT = tuple(name for name in MEASURED if name not in ("probe_size", "means_every"))
FIGURES = {
    "1": FigureSpec(
        title="The activation functions",
        condense=lambda table: table,
        panels=figure1,
        numbers=lambda table: [],
    ),
    "2": FigureSpec(
        title="Mean unit activations and learning curves of fully connected networks",
        command="biasshift train mnist",
        paper="MNIST, 8 × 128, 300 epochs, 5 runs; it prints no numbers, and the means are flat "
        "after epoch 25",
        condense=means_and_losses,
        panels=figure2,
        numbers=numbers2,
        experiments=("mnist", "digits"),
        prefer={"depth": 8, "width": 128, **PLAIN},
        quick=("train mnist --epochs 2 --seeds 2 --exam-probe 2000",),
        irrelevant=IRRELEVANT,
    ),
    "3": FigureSpec(
        title="Autoencoders: reconstruction error",
        command="biasshift train autoencoder",
        paper="MNIST, 500 epochs, several runs; it prints no numbers",
        condense=errors,
        panels=figure3,
        numbers=numbers3,
        experiments=("autoencoder",),
        quick=("train autoencoder --epochs 1 --seeds 1 --instrument activations",),
        compared=("lr",),
    ),
    "7": FigureSpec(
        title="Variance over epochs of the activations of hidden units",
        command="biasshift train mnist --depth 5 --width 256 --epochs 200 --activation elu relu",
        paper="MNIST, 5 × 256, 200 epochs; it prints no numbers",
        condense=variances,
        panels=figure7,
        numbers=numbers7,
        experiments=("mnist", "digits"),
        prefer={"depth": 5, "width": 256, **PLAIN},
        quick=(
            "train mnist --depth 5 --width 256 --epochs 3 --seeds 1 --activation elu relu "
            "--fisher-every 0 --exam-probe 2000",
        ),
        irrelevant=IRRELEVANT,
    ),
}
