"""Figures 4, 5 and 6, and Table 1: convolutional networks on CIFAR and ImageNet."""

import pandas as pd

from biasshift import plots
from biasshift.experiments import cifar11, cifar18
from biasshift.figures.captions import comparable, described, finish, over_seeds, synthetic
from biasshift.figures.selection import kept
from biasshift.figures.spec import NONE_PRINTED, NOTHING, FigureSpec, Number, final_values

SPLIT = 90_000 / cifar11.STEPS  # where the panels of Figures 4 and 5 divide training
# Test errors in percent at the end, mean and SD of 10 runs.
TEST_ERRORS = {
    "elu": (28.75, 0.24),
    "srelu": (29.35, 0.29),
    "lrelu": (30.59, 0.29),
    "relu": (31.56, 0.37),
}
TRAIN_LOSSES = {"elu": 0.345, "srelu": 0.39, "lrelu": 0.48, "relu": 0.53}  # read off Figure 4
# What the paper says of batch normalization.
NORMED = {"elu": "did not help", "srelu": "did not help", "lrelu": "helped", "relu": "helped"}
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
    """Returns the training loss (nats) and the test error (a fraction) of every run, along it.

    One row per run and evaluation, where one of the two has a value.
    """
    return _scores(table, "this figure", "test_error")


def _scores(table: pd.DataFrame, what: str, *errors: str) -> pd.DataFrame:
    """Training loss and errors, where the loss or the last of the errors has a value."""
    plots.need(table, ["train_loss", *errors, "activation"], what)
    scored = table["train_loss"].notna() | table[errors[-1]].notna()
    return kept(table.loc[(table["layer"] == "") & scored], ["epoch", "train_loss", *errors])


# -- Figure 4: CIFAR-100, 11 layers ------------------------------------------------------------


def figure4(table: pd.DataFrame) -> plots.Figure:
    """Returns training loss and test error of the 11-layer networks (Figure 4).

    The columns of panels show the whole training, its start and its end. Runs of the paper's length
    and size get the paper's numbers as hollow marks.
    """
    figure, axes = plots.panels(6, rows=2, width=2.9, height=2.4)
    last = float(table["step"].max())
    split = last * SPLIT
    parts = {
        "whole": table,
        "start": table.loc[table["step"] <= split],
        "end": table.loc[table["step"] >= split],
    }
    columns = {"train_loss": "training loss (nats)", "test_error": "test error (%)"}
    for row, (column, name) in enumerate(columns.items()):
        for number, part in enumerate(parts.values()):
            ax = axes[3 * row + number]
            if part[column].notna().any():  # of few scores, there may be none in a part
                plots.curves(ax, part, column)
                plots.in_thousands(ax)
            ax.set_ylabel("" if number else name)
            if row:
                plots.in_percent(ax.yaxis)
    if _comparable(table):
        errors = {name: error / 100 for name, (error, _) in TEST_ERRORS.items()}
        for ax, values in ((axes[2], TRAIN_LOSSES), (axes[5], errors)):
            plots.published(ax, [(last, value, name) for name, value in values.items()])
    letters = [f"{name}, {part}" for name in ("training loss", "test error") for part in parts]
    return finish(figure, axes, letters, f"{over_seeds(table)}\n{described(table)}")


def numbers4(table: pd.DataFrame) -> list[Number]:
    """Returns test errors and training losses at the end, beside the paper's if they compare."""
    losses = {name: f"about {loss}" for name, loss in TRAIN_LOSSES.items()}
    return [
        *final_values(
            table, "test_error", _errors_of_paper(table), "test error at the end", percent=True
        ),
        *final_values(
            table, "train_loss", losses if _comparable(table) else {}, "training loss at the end"
        ),
    ]


def _comparable(table: pd.DataFrame) -> bool:
    """Whether the paper's 11-layer networks were trained like these."""
    return comparable(table, "cifar100", cifar11.STEPS)


def _errors_of_paper(table: pd.DataFrame) -> dict[str, str]:
    if not _comparable(table):
        return {}
    return {name: f"{error} ± {sd} % (n = 10)" for name, (error, sd) in TEST_ERRORS.items()}


# -- Figure 5: with and without batch normalization --------------------------------------------


def normed_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the scores of runs with and without batch normalization, as `scores` has them.

    Raises:
        ValueError: all of the runs have it, or none of them.
    """
    plots.need(table, ["batch_norm"], "figure 5")
    normed = table["batch_norm"].astype(bool)
    if normed.nunique() < 2:
        raise ValueError(
            "Figure 5 compares networks with and without batch normalization, and all of these "
            f"are {'with' if normed.all() else 'without'}. "
            "Add runs of `biasshift train cifar11`, with and without --batch-norm."
        )
    return scores(table)


def figure5(table: pd.DataFrame) -> plots.Figure:
    """Returns test errors with and without batch normalization (Figure 5).

    Each column of panels shows ELU beside one other activation function: the whole training above,
    its end below. Lines are solid without batch normalization, and dotted with it.
    """
    others = [
        name for name in ("relu", "srelu", "lrelu") if (table["activation"] == name).any()
    ] or ["elu"]
    figure, axes = plots.panels(2 * len(others), rows=2, width=2.9, height=2.4)
    ends = table.loc[table["step"] >= float(table["step"].max()) * SPLIT]
    for number, ax in enumerate(axes):
        place, other = divmod(number, len(others))
        part = (table, ends)[place]
        pair = part.loc[part["activation"].isin(["elu", others[other]])]
        normed = pair["batch_norm"].astype(bool)
        for rows, line in ((pair.loc[~normed], "-"), (pair.loc[normed], ":")):
            if rows["test_error"].notna().any():
                plots.curves(ax, rows, "test_error", line=line, named=line == "-")
        plots.in_thousands(ax)
        plots.in_percent(ax.yaxis)
        ax.set_ylabel("" if other else "test error (%)")
    for line, name in (("-", "without batch norm"), (":", "with batch norm")):
        axes[0].plot([], [], line, color="0.4", label=name)
    letters = [
        f"ELU and {plots.LOOKS[other].label}, {place}"
        for place in ("whole", "end")
        for other in others
    ]
    return finish(figure, axes, letters, f"{over_seeds(table)}\n{described(table)}")


def numbers5(table: pd.DataFrame) -> list[Number]:
    """Returns test errors at the end, without and with batch normalization.

    With batch normalization the paper prints none, but says that it helped ReLU and LReLU only.
    """
    normed = table["batch_norm"].astype(bool)
    paper = _errors_of_paper(table.loc[~normed])
    helped = {name: f"{NONE_PRINTED}; it {effect}" for name, effect in NORMED.items()}
    return [
        number
        for rows, printed, name in (
            (table.loc[~normed], paper, "without"),
            (table.loc[normed], helped if paper else {}, "with"),
        )
        for number in final_values(
            rows, "test_error", printed, f"test error {name} batch norm", percent=True
        )
    ]


# -- Figure 6: ImageNet ------------------------------------------------------------------------


def imagenet_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Returns training loss (nats), top-5 and top-1 validation error of every run, along it."""
    return _scores(table, "figure 6", "valid_error5", "valid_error")


def figure6(table: pd.DataFrame) -> plots.Figure:
    """Returns training loss, top-5 and top-1 error on validation images (Figure 6).

    The x axis counts iterations. If these runs are of ImageNet and got that far, hollow marks show
    when the paper's networks came down to a top-5 error of 20 %.
    """
    figure, axes = plots.panels(3, width=2.9, height=2.9)
    names = {
        "train_loss": "training loss (nats)",
        "valid_error5": "top-5 error (%)",
        "valid_error": "top-1 error (%)",
    }
    for ax, (column, name) in zip(axes, names.items(), strict=True):
        plots.curves(ax, table, column)
        plots.in_thousands(ax)
        ax.set_ylabel(name)
        if column != "train_loss":
            plots.in_percent(ax.yaxis)
    plots.published(axes[1], [(float(TOP5[name]), 0.2, name) for name in _within(table)])
    letters = [name.partition(" (")[0] for name in names.values()]
    return finish(figure, axes, letters, f"{over_seeds(table)}\n{described(table)}")


def numbers6(table: pd.DataFrame) -> list[Number]:
    """Returns top-5 and top-1 errors at the end, beside the paper's if they compare."""
    top5 = {name: TOP5_SAID[name] for name in _within(table)}
    top1 = NONE_PRINTED if top5 else {}
    return [
        *final_values(table, "valid_error5", top5, "top-5 error at the end", percent=True),
        *final_values(table, "valid_error", top1, "top-1 error at the end", percent=True),
    ]


def _within(table: pd.DataFrame) -> list[str]:
    """The activations whose published number lies within what these runs trained."""
    if not comparable(table, "imagenet (1000 classes)"):
        return []
    return [name for name, steps in TOP5.items() if table["step"].max() >= steps]


# -- Table 1: CIFAR-10 and CIFAR-100, 18 layers ------------------------------------------------


def last_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the last scores of every run that have a test error: one row per run."""
    tested = scores(table)
    tested = tested.loc[tested["test_error"].notna()].sort_values("step", kind="stable")
    return tested.drop_duplicates("run", keep="last")


def table1(table: pd.DataFrame) -> plots.Figure:
    """Returns test errors of the 18-layer networks beside those that the paper lists (Table 1).

    There is a panel for each data set that there are runs of, and a row per network, with means
    over seeds. Errors on synthetic data stand alone.
    """
    random = synthetic(table)
    datasets = [name for name in DATASETS if (table["dataset"] == name).any()]
    figure, axes = plots.panels(len(datasets), width=3.6, height=3.4)
    for ax, dataset in zip(axes, datasets, strict=True):
        rows = table.loc[table["dataset"] == dataset]
        errors, marks = {}, {}
        for activation, look in plots.looks(rows["activation"].unique()).items():
            values = rows.loc[rows["activation"] == activation, "test_error"]
            name = f"{look.label}, these runs (n = {len(values)})"
            errors[name], marks[name] = 100 * values.mean(), look
        place = list(DATASETS).index(dataset)
        paper = {} if random else {name: listed[place] for name, listed in TABLE1.items()}
        plots.ranking(ax, errors, paper, marks)
        ax.set(xlabel="test error (%)", title="synthetic data" if random else DATASETS[dataset])
    if not random:
        plots.one_legend(figure, axes)
    plots.headed(figure, described(table))
    return figure


def numbers_of_table1(table: pd.DataFrame) -> list[Number]:
    """Returns the errors of the paper's networks on both data sets, and those of these runs.

    The paper's stand beside those of these runs if they compare; on synthetic data, the paper's
    networks are left out.
    """
    random = synthetic(table)
    numbers = (
        []
        if random
        else [
            Number(name, NOTHING, f"{ten:.2f} % / {hundred:.2f} %")
            for name, (ten, hundred) in TABLE1.items()
        ]
    )
    for dataset, error in zip(DATASETS, TABLE1["ELU network"], strict=True):
        rows = table.loc[table["dataset"] == dataset]
        paper = dict.fromkeys(plots.LOOKS, NONE_PRINTED) | {"elu": f"{error:.2f} %"}
        if not comparable(rows, dataset, cifar18.STEPS):
            paper = {}
        name = f"these runs, {'synthetic data' if random else dataset}"
        numbers += final_values(rows, "test_error", paper, name, percent=True)
    return numbers


CIFAR = "CIFAR-100, 165,000 updates, 10 runs"
SHORT = (
    "train cifar11 --steps 20 --seeds 1 --score-every 5 --instrument activations --test-images 500"
)
FIGURES = {
    "4": FigureSpec(
        title="CIFAR-100, 11 layers: training loss and test error",
        command="biasshift train cifar11",
        paper=CIFAR,
        condense=scores,
        panels=figure4,
        numbers=numbers4,
        experiments=("cifar11",),
        prefer={"dataset": "cifar100", "batch_norm": False, "width": 1.0},
        quick=(SHORT,),
        comparable=_comparable,
    ),
    "5": FigureSpec(
        title="CIFAR-100, 11 layers: with and without batch normalization",
        command="biasshift train cifar11, with and without --batch-norm",
        paper=CIFAR,
        condense=normed_scores,
        panels=figure5,
        numbers=numbers5,
        experiments=("cifar11",),
        prefer={"dataset": "cifar100", "width": 1.0},
        quick=(SHORT, f"{SHORT} --batch-norm"),
        compared=("batch_norm",),
        comparable=lambda table: _comparable(table.loc[~table["batch_norm"].astype(bool)]),
    ),
    "6": FigureSpec(
        title="ImageNet, 15 layers: training loss and validation errors",
        command="biasshift train imagenet",
        paper="ImageNet, 1000 classes, about 250,000 updates",
        condense=imagenet_scores,
        panels=figure6,
        numbers=numbers6,
        experiments=("imagenet",),
        prefer={"width": 1.0},
        quick=("train imagenet --steps 20 --score-every 5",),
        comparable=lambda table: bool(_within(table)),
    ),
    "table1": FigureSpec(
        title="Test errors on CIFAR-10 and CIFAR-100",
        command="biasshift train cifar18",
        paper="ten networks",
        condense=last_scores,
        panels=table1,
        numbers=numbers_of_table1,
        experiments=("cifar18",),
        prefer={"batch_norm": False, "width": 1.0},
        quick=(
            "train cifar18 --steps 10 --score-every 5 --instrument activations --test-images 500",
        ),
        compared=("dataset",),
    ),
}
