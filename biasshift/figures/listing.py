"""Table 1: the last test errors of the 18-layer networks, beside those that the paper lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.figures.choosing import described
from biasshift.figures.drawing import Drawing, Number, finals
from biasshift.figures.pictures import scores

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure

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
    """Test errors of the 18-layer networks beside the ten that the paper lists (Table 1)."""
    figure, axes = plots.panels(2, width=3.2, height=3.4)
    for column, (ax, dataset) in enumerate(zip(axes, ("cifar10", "cifar100"), strict=True)):
        plots.ranking(ax, _ours(table, dataset), {name: errors[column] for name, errors in TABLE1.items()})
        ax.set(xlabel="test error (%)", title=("CIFAR-10", "CIFAR-100")[column])
    plots.one_legend(figure, axes[::-1])
    plots.headed(figure, described(table))
    return figure


def _ours(table: pd.DataFrame, dataset: str) -> dict[str, float]:
    """Mean test error in percent over seeds, activation by activation."""
    rows = table.loc[table["dataset"] == dataset]
    looks = plots.looks(rows["activation"].unique())
    return {f"{look.label}, these runs": 100 * rows.loc[rows["activation"] == name, "test_error"].mean() for name, look in looks.items()}


def numbers_of_table1(table: pd.DataFrame) -> list[Number]:
    """The paper's ten networks, and these."""
    listed = [Number(name, "–", f"{ten:.2f} % / {hundred:.2f} %") for name, (ten, hundred) in TABLE1.items()]
    for place, dataset in enumerate(("cifar10", "cifar100")):
        paper = {"elu": f"{TABLE1['ELU network'][place]:.2f} %"}
        listed += finals(table.loc[table["dataset"] == dataset], "test_error", paper, f"these runs, {dataset}", percent=True)
    return listed


FIGURES = {
    "table1": Drawing(
        "Test errors on CIFAR-10 and CIFAR-100", "biasshift train cifar18", "ten networks", last_scores, table1, numbers_of_table1,
        ("cifar18",), {"batch_norm": False, "width": 1.0},
        ("train cifar18 --steps 10 --score-every 5 --instrument activations --test-images 500",),
    ),
}  # fmt: skip
