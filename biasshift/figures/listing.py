"""Table 1: the last test errors of the 18-layer networks, beside those that the paper lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.experiments import cifar18
from biasshift.figures.captions import described, like_the_papers, synthetic
from biasshift.figures.convnets import scores
from biasshift.figures.spec import NONE_PRINTED, Drawing, Number, finals
from biasshift.plots.looks import Look

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

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


def last_scores(table: pd.DataFrame) -> pd.DataFrame:
    """The last test error of every run."""
    found = scores(table)
    return found.loc[found["test_error"].notna()].sort_values("step", kind="stable").drop_duplicates("run", keep="last")


def table1(table: pd.DataFrame) -> Figure:
    """Test errors of the 18-layer networks beside the ten that the paper lists (Table 1), of the data sets that there are runs of.

    Errors on synthetic data stand alone.
    """
    there = [name for name in DATASETS if (table["dataset"] == name).any()]
    figure, axes = plots.panels(len(there), width=3.6, height=3.4)
    for ax, dataset in zip(axes, there, strict=True):
        found = _ours(table, dataset)
        paper = {} if synthetic(table) else {name: errors[list(DATASETS).index(dataset)] for name, errors in TABLE1.items()}
        plots.ranking(ax, {name: error for name, (error, _) in found.items()}, paper, {name: look for name, (_, look) in found.items()})
        ax.set(xlabel="test error (%)", title="synthetic data" if synthetic(table) else DATASETS[dataset])
    if not synthetic(table):
        plots.one_legend(figure, axes)
    plots.headed(figure, described(table))
    return figure


def _ours(table: pd.DataFrame, dataset: str) -> dict[str, tuple[float, Look]]:
    """Mean test error in percent over seeds, activation by activation."""
    rows = table.loc[table["dataset"] == dataset]
    errors = {name: rows.loc[rows["activation"] == name, "test_error"] for name in rows["activation"].unique()}
    looks = plots.looks(errors)
    return {f"{look.label}, these runs (n = {len(errors[name])})": (100 * errors[name].mean(), look) for name, look in looks.items()}


def _fit(table: pd.DataFrame) -> bool:
    return all(like_the_papers(rows, str(dataset), cifar18.STEPS) for dataset, rows in table.groupby("dataset", observed=True))


def numbers_of_table1(table: pd.DataFrame) -> list[Number]:
    """The paper's ten networks, and these."""
    real = not synthetic(table)
    listed = [Number(name, "–", f"{ten:.2f} % / {hundred:.2f} %") for name, (ten, hundred) in TABLE1.items()] * real
    for place, dataset in enumerate(DATASETS):
        rows = table.loc[table["dataset"] == dataset]
        paper = dict.fromkeys(("srelu", "lrelu", "relu"), NONE_PRINTED) | {"elu": f"{TABLE1['ELU network'][place]:.2f} %"}
        name = f"these runs, {dataset if real else 'synthetic data'}"
        listed += finals(rows, "test_error", paper if len(rows) and _fit(rows) else {}, name, percent=True)
    return listed


FIGURES = {
    "table1": Drawing(
        "Test errors on CIFAR-10 and CIFAR-100", "biasshift train cifar18", "ten networks", last_scores, table1, numbers_of_table1,
        ("cifar18",), {"batch_norm": False, "width": 1.0},
        ("train cifar18 --steps 10 --score-every 5 --instrument activations --test-images 500",), apart=("dataset",),
    ),
}  # fmt: skip
