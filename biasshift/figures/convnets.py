"""Figures 4, 5 and 6: convolutional networks along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.experiments import cifar11, cifar18
from biasshift.figures.captions import described, like_the_papers, over_seeds, synthetic
from biasshift.figures.selection import kept
from biasshift.figures.spec import NONE_PRINTED, Drawing, Number, finals
from biasshift.plots.theme import Look

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

SPLIT = 90_000 / cifar11.STEPS  # where the panels of Figure 4 divide it
TEST_ERRORS = {
    "elu": (28.75, 0.24),
    "srelu": (29.35, 0.29),
    "lrelu": (30.59, 0.29),
    "relu": (31.56, 0.37),
}  # 10 runs
TRAIN_LOSSES = {"elu": 0.345, "srelu": 0.39, "lrelu": 0.48, "relu": 0.53}  # read off Figure 4
NORMED = {
    "elu": "did not help",
    "srelu": "did not help",
    "lrelu": "helped",
    "relu": "helped",
}  # what is said of batch norm
TOP5 = {"elu": 160_000, "relu": 200_000}  # iterations to 20 % top-5 error
TOP5_SAID = {"elu": "20 % after 160k, < 10 % at the end", "relu": "20 % after 200k"}
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
TABLE1 = {  # test error in percent on CIFAR-10 and CIFAR-100
    "AlexNet": (18.04, 45.80),
    "DSN": (7.97, 34.57),
    "NiN": (8.81, 35.68),
    "Maxout": (9.38, 38.57),
    "All-CNN": (7.25, 33.71),
    "Highway": (7.60, 32.24),
    "Fract. max-pooling": (4.50, 27.62),
    "ELU network": (6.55, 24.28),
}


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Training loss and test error of every run."""
    plots.need(table, ["train_loss", "test_error", "activation"], "this figure")
    network = table.loc[
        (table["layer"] == "") & (table["train_loss"].notna() | table["test_error"].notna())
    ]
    return kept(network, ["epoch", "train_loss", "test_error"])


def figure4(table: pd.DataFrame) -> Figure:
    """Training loss and test error of the 11-layer networks: whole, start and end of training
    (Figure 4).
    """
    figure, axes = plots.panels(6, rows=2, width=2.9, height=2.4)
    last = float(table["step"].max())
    split = last * SPLIT
    parts = (table, table.loc[table["step"] <= split], table.loc[table["step"] >= split])
    for row, (column, name) in enumerate(
        (("train_loss", "training loss (nats)"), ("test_error", "test error (%)"))
    ):
        for number, part in enumerate(parts):
            ax = axes[3 * row + number]
            if part[column].notna().any():  # of few scores, there may be none in a part
                plots.curves(ax, part, column)
                plots.in_thousands(ax)
            ax.set_ylabel("" if number else name)
            if row:
                plots.in_percent(ax.yaxis)
    if _as_long(table):
        plots.published(axes[2], [(last, loss, name) for name, loss in TRAIN_LOSSES.items()])
        plots.published(
            axes[5], [(last, error / 100, name) for name, (error, _) in TEST_ERRORS.items()]
        )
    places = ("whole", "start", "end")
    plots.lettered(
        axes, [f"{name}, {place}" for name in ("training loss", "test error") for place in places]
    )
    plots.one_legend(figure, axes)
    plots.headed(figure, f"{over_seeds(table)}\n{described(table)}")
    return figure


def numbers4(table: pd.DataFrame) -> list[Number]:
    """Test errors and training losses at the end."""
    paper = _errors_said(table)
    losses = (
        {name: f"about {loss}" for name, loss in TRAIN_LOSSES.items()} if _as_long(table) else {}
    )
    return [
        *finals(table, "test_error", paper, "test error at the end", percent=True),
        *finals(table, "train_loss", losses, "training loss at the end"),
    ]


def normed_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Test errors with and without batch normalization."""
    plots.need(table, ["batch_norm"], "figure 5")
    if table["batch_norm"].astype(bool).nunique() < 2:
        there = "with" if table["batch_norm"].astype(bool).all() else "without"
        raise ValueError(
            "Figure 5 compares networks with and without batch normalization, and all of these "
            f"are {there}: "
            "add those of `biasshift train cifar11` with and without --batch-norm."
        )
    return scores(table)


def figure5(table: pd.DataFrame) -> Figure:
    """Test errors with and without batch normalization, ELU beside one other activation a panel
    (Figure 5).
    """
    others = [
        name for name in ("relu", "srelu", "lrelu") if (table["activation"] == name).any()
    ] or ["elu"]
    figure, axes = plots.panels(2 * len(others), rows=2, width=2.9, height=2.4)
    split = float(table["step"].max()) * SPLIT
    for number, other in enumerate(others):
        pair = table.loc[table["activation"].isin(["elu", other])]
        for ax, part in (
            (axes[number], pair),
            (axes[len(others) + number], pair.loc[pair["step"] >= split]),
        ):
            normed = part["batch_norm"].astype(bool)
            for rows, line, named in (
                (part.loc[~normed], "-", True),
                (part.loc[normed], ":", False),
            ):
                if rows["test_error"].notna().any():
                    plots.curves(ax, rows, "test_error", line=line, named=named)
            plots.in_thousands(ax)
            plots.in_percent(ax.yaxis)
            ax.set_ylabel("" if number else "test error (%)")
    for line, name in (("-", "without batch norm"), (":", "with batch norm")):
        axes[0].plot([], [], line, color="0.4", label=name)
    names = [f"ELU and {plots.LOOKS[other].label}" for other in others]
    plots.lettered(axes, [f"{name}, {place}" for place in ("whole", "end") for name in names])
    plots.one_legend(figure, axes)
    plots.headed(figure, f"{over_seeds(table)}\n{described(table)}")
    return figure


def numbers5(table: pd.DataFrame) -> list[Number]:
    """Test errors at the end. The paper prints none with batch normalization, but that it helped
    ReLU and LReLU only.
    """
    normed = table["batch_norm"].astype(bool)
    plain = _errors_said(table.loc[~normed])
    helped = {name: f"{NONE_PRINTED}; it {said}" for name, said in NORMED.items()} if plain else {}
    return [
        *finals(
            table.loc[~normed], "test_error", plain, "test error without batch norm", percent=True
        ),
        *finals(
            table.loc[normed], "test_error", helped, "test error with batch norm", percent=True
        ),
    ]


def _as_long(table: pd.DataFrame) -> bool:
    """Whether the paper's 11-layer networks were trained like these."""
    return like_the_papers(table, "cifar100", cifar11.STEPS)


def _errors_said(table: pd.DataFrame) -> dict[str, str]:
    return (
        {name: f"{error} ± {sd} % (n = 10)" for name, (error, sd) in TEST_ERRORS.items()}
        if _as_long(table)
        else {}
    )


def imagenet_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Training loss, top-5 and top-1 error of every run."""
    plots.need(table, ["train_loss", "valid_error5", "valid_error", "activation"], "figure 6")
    network = table.loc[
        (table["layer"] == "") & (table["train_loss"].notna() | table["valid_error"].notna())
    ]
    return kept(network, ["epoch", "train_loss", "valid_error5", "valid_error"])


def figure6(table: pd.DataFrame) -> Figure:
    """Training loss, top-5 and top-1 error on validation images against iterations (Figure 6)."""
    figure, axes = plots.panels(3, width=2.9, height=2.9)
    shown = (
        ("train_loss", "training loss (nats)"),
        ("valid_error5", "top-5 error (%)"),
        ("valid_error", "top-1 error (%)"),
    )
    for ax, (column, name) in zip(axes, shown, strict=True):
        plots.curves(ax, table, column)
        plots.in_thousands(ax)
        ax.set_ylabel(name)
        if column != "train_loss":
            plots.in_percent(ax.yaxis)
    plots.published(axes[1], [(float(TOP5[name]), 0.2, name) for name in _got_to(table)])
    plots.lettered(axes, ["training loss", "top-5 error", "top-1 error"])
    plots.one_legend(figure, axes)
    plots.headed(figure, f"{over_seeds(table)}\n{described(table)}")
    return figure


def numbers6(table: pd.DataFrame) -> list[Number]:
    """Errors at the end."""
    paper = {name: TOP5_SAID[name] for name in _got_to(table)}
    return [
        *finals(table, "valid_error5", paper, "top-5 error at the end", percent=True),
        *finals(
            table,
            "valid_error",
            NONE_PRINTED if paper else {},
            "top-1 error at the end",
            percent=True,
        ),
    ]


def _got_to(table: pd.DataFrame) -> list[str]:
    """The activations whose published number lies within what these runs trained."""
    last = table["step"].max()
    return (
        [name for name, steps in TOP5.items() if last >= steps]
        if like_the_papers(table, "imagenet (1000 classes)")
        else []
    )


# -- table 1 -----------------------------------------------------------------------------------


def last_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The last test error of every run."""
    found = scores(table)
    return (
        found.loc[found["test_error"].notna()]
        .sort_values("step", kind="stable")
        .drop_duplicates("run", keep="last")
    )


def table1(table: pd.DataFrame) -> Figure:
    """Test errors of the 18-layer networks beside the ten that the paper lists (Table 1), of the
    data sets that there are runs of.

    Errors on synthetic data stand alone.
    """
    there = [name for name in DATASETS if (table["dataset"] == name).any()]
    figure, axes = plots.panels(len(there), width=3.6, height=3.4)
    for ax, dataset in zip(axes, there, strict=True):
        found = _ours(table, dataset)
        paper = (
            {}
            if synthetic(table)
            else {name: errors[list(DATASETS).index(dataset)] for name, errors in TABLE1.items()}
        )
        plots.ranking(
            ax,
            {name: error for name, (error, _) in found.items()},
            paper,
            {name: look for name, (_, look) in found.items()},
        )
        ax.set(
            xlabel="test error (%)",
            title="synthetic data" if synthetic(table) else DATASETS[dataset],
        )
    if not synthetic(table):
        plots.one_legend(figure, axes)
    plots.headed(figure, described(table))
    return figure


def _ours(table: pd.DataFrame, dataset: str) -> dict[str, tuple[float, Look]]:
    """Mean test error in percent over seeds, activation by activation."""
    rows = table.loc[table["dataset"] == dataset]
    errors = {
        name: rows.loc[rows["activation"] == name, "test_error"]
        for name in rows["activation"].unique()
    }
    looks = plots.looks(errors)
    return {
        f"{look.label}, these runs (n = {len(errors[name])})": (100 * errors[name].mean(), look)
        for name, look in looks.items()
    }


def _fit(table: pd.DataFrame) -> bool:
    return all(
        like_the_papers(rows, str(dataset), cifar18.STEPS)
        for dataset, rows in table.groupby("dataset", observed=True)
    )


def numbers_of_table1(table: pd.DataFrame) -> list[Number]:
    """The paper's ten networks, and these."""
    real = not synthetic(table)
    listed = [
        Number(name, "–", f"{ten:.2f} % / {hundred:.2f} %")
        for name, (ten, hundred) in TABLE1.items()
    ] * real
    for place, dataset in enumerate(DATASETS):
        rows = table.loc[table["dataset"] == dataset]
        paper = dict.fromkeys(("srelu", "lrelu", "relu"), NONE_PRINTED) | {
            "elu": f"{TABLE1['ELU network'][place]:.2f} %"
        }
        name = f"these runs, {dataset if real else 'synthetic data'}"
        listed += finals(
            rows, "test_error", paper if len(rows) and _fit(rows) else {}, name, percent=True
        )
    return listed


CIFAR = "CIFAR-100, 165,000 updates, 10 runs"
SHORT = (
    "train cifar11 --steps 20 --seeds 1 --score-every 5 --instrument activations --test-images 500"
)
FIGURES = {
    "4": Drawing(
        "CIFAR-100, 11 layers: training loss and test error", "biasshift train cifar11", CIFAR,
        scores, figure4, numbers4, ("cifar11",), {"dataset": "cifar100", "batch_norm": False, "width": 1.0}, (SHORT,),
        fits=_as_long,
    ),
    "5": Drawing(
        "CIFAR-100, 11 layers: with and without batch normalization", "biasshift train cifar11, "
                                                                      "with and without "
                                                                      "--batch-norm", CIFAR,
        normed_scores, figure5, numbers5, ("cifar11",), {"dataset": "cifar100", "width": 1.0}, (SHORT, f"{SHORT} --batch-norm"),
        apart=("batch_norm",), fits=lambda table: _as_long(table.loc[~table["batch_norm"].astype(bool)]),
    ),
    "6": Drawing(
        "ImageNet, 15 layers: training loss and validation errors", "biasshift train imagenet",
        "ImageNet, 1000 classes, about 250,000 "
        "updates", imagenet_scores, figure6, numbers6, ("imagenet",), {"width": 1.0},
        ("train imagenet --steps 20 --score-every 5",), fits=lambda table: bool(_got_to(table)),
    ),
    "table1": Drawing(
        "Test errors on CIFAR-10 and CIFAR-100", "biasshift train "
                                                 "cifar18", "ten networks", last_scores, table1, numbers_of_table1,
        ("cifar18",), {"batch_norm": False, "width": 1.0},
        ("train cifar18 --steps 10 --score-every 5 --instrument activations --test-images "
         "500",), apart=("dataset",),
    ),
}  # fmt: skip
