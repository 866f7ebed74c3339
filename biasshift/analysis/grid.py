"""What runs of one experiment may differ in, and which learning rate each kind of run is judged at.

A *cell* is an activation function, an update, a constant that is added to the activations, and
whether there is batch normalization. Every cell is trained at the same learning rates with the same
seeds, and one rule chooses for all of them.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from biasshift.activation_names import LABELS, display_name
from biasshift.analysis.learning_curves import TINY

NAMES = LABELS
PAPER = ("elu", "relu", "lrelu", "srelu")  # the activation functions that its claims are about
CELL = ("activation", "update", "constant", "batch_norm")
UNKNOWN = 0.0  # learning rate of runs that do not record one: the same for all
RULE = (
    "of those tried for all alike: fewest runs that stopped early, then the lowest geometric mean "
    "of the training losses at the end"
)
# What runs that are compared must share, where they record it; so they must the options of the
# updates, named update_….
SHARED = (
    "experiment", "dataset", "epochs", "steps", "batch_size", "optimizer", "momentum",
    "weight_decay", "dropout", "loss", "depth", "width", "init", "code", "stride", "crop",
    "geometry", "preprocessing", "augmented", "subtracted", "scores_per_epoch", "score_every",
    "scored", "probe_size", "exam_size", "means_every", "fisher_every", "every", "equal_loss",
    "units_measured", "damping",
)  # fmt: skip


class Cell(NamedTuple):
    """One kind of network and update."""

    activation: str
    update: str = "plain"
    constant: float = 0.0
    batch_norm: bool = False

    @property
    def name(self) -> str:
        """The cell for people, such as "ReLU, centered"."""
        parts = [
            display_name(self.activation),
            self.update if self.update != "plain" else "",
            f"activations + {self.constant:g}" if self.constant else "",
            "batch norm" if self.batch_norm else "",
        ]
        return ", ".join(filter(None, parts))


def cells_of(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run: ``run``, ``seed``, ``lr`` and the columns of its cell.

    What older runs do not record has the default of `Cell`; a learning rate that is not recorded
    is 0.

    Raises:
        ValueError: if two runs have one cell, learning rate and seed, or cells were not trained at
            the same learning rates.
    """
    first = table.drop_duplicates("run")
    columns = {
        "run": first["run"],
        "seed": first["seed"],
        "lr": first["lr"].astype(float).fillna(UNKNOWN) if "lr" in first else UNKNOWN,
    }
    for name, default in zip(CELL, Cell(""), strict=True):
        values = list(first[name]) if name in first else [default] * len(first)
        columns[name] = [
            default if value is None or value != value else type(default)(value) for value in values
        ]
    runs = pd.DataFrame(columns).reset_index(drop=True)
    twice = runs.loc[runs.duplicated([*CELL, "lr", "seed"])]
    if len(twice):
        raise ValueError(
            f"There are two runs of '{_in_config(cell_of(twice))}' with seed "
            f"{twice['seed'].iloc[0]}. Give one of them."
        )
    _refuse_unequal_rates(runs)
    return runs


def _refuse_unequal_rates(runs: pd.DataFrame) -> None:
    """Cells with a constant or batch norm may have been tried at fewer rates than others, but
    equally among themselves.
    """
    for _, group in runs.groupby(["constant", "batch_norm"]):
        cells = group.groupby(list(CELL))
        rates = {cell_of(runs): sorted(runs["lr"].unique()) for _, runs in cells}
        (first, expected), *others = rates.items()
        for cell, tried in others:
            if tried != expected:
                raise ValueError(
                    "The learning rates are not the same for all: "
                    f"'{_in_config(first)}' was trained at {_listed(expected)}, "
                    f"'{_in_config(cell)}' at {_listed(tried)}. A rate that was searched for one "
                    "of them alone would decide: complete the grid."
                )


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _in_config(cell: Cell) -> str:
    """The name of a cell with its activation as configs spell it: "relu, centered"."""
    return ", ".join([cell.activation, *cell.name.split(", ")[1:]])


def cell_of(runs: pd.DataFrame) -> Cell:
    """Returns the cell of the first run."""
    return Cell(*(runs[name].iloc[0] for name in CELL))


def mixed_option(
    table: pd.DataFrame, options: tuple[str, ...] = (), ignored: tuple[str, ...] = ()
) -> tuple[str, list[Any]] | None:
    """Returns the first option that the runs of a table differ in, with its values in order.

    Looks at ``options`` first, then at what runs must share to be compared, and at the options of
    the updates. Runs that do not record an option do not count; None where no option differs.

    Args:
        table: rows of runs, with a column ``run``.
        options: further columns that must be the same for all.
        ignored: columns that may differ.
    """
    runs = table.drop_duplicates("run")
    updates = [name for name in runs if str(name).startswith("update_")]
    for name in dict.fromkeys([*options, *SHARED, *updates]):
        if name in runs and name not in ignored:
            values = runs[name].dropna().astype(object).unique()
            if len(values) > 1:
                return name, sorted(values, key=lambda value: (isinstance(value, str), value))
    return None


def paper_runs(numbers: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that the paper compared: plain gradient descent at one rate for all.

    Nothing is added to their activations. The rate is that of `best_rate` over these runs together;
    runs with other activation functions than the paper's choose it only where there are no others,
    so that they change nothing in what is said of the paper's. They are without batch
    normalization, unless all networks have it.
    """
    plain = numbers.loc[
        (numbers["update"] == "plain").to_numpy() & (numbers["constant"] == 0).to_numpy()
    ]
    normed = plain["batch_norm"].to_numpy(bool)
    plain = plain if normed.all() else plain.loc[~normed]
    if not len(plain):
        return plain
    compared = plain.loc[plain["activation"].isin(PAPER).to_numpy()]
    rate = best_rate(compared if len(compared) else plain)
    return plain.loc[(plain["lr"] == rate).to_numpy()]


def best_rate(numbers: pd.DataFrame) -> float:
    """Returns the learning rate to judge runs at, chosen by `RULE`.

    Activations count alike: logarithms of losses are averaged. A run that diverged stopped early,
    and so did one that is not there although its seed is at another rate: no rate is chosen for the
    runs that survived it.
    """
    expected = len(numbers.drop_duplicates([name for name in (*CELL, "seed") if name in numbers]))
    losses = numbers.assign(ln_loss=np.log(numbers["train_loss"].astype(float).clip(lower=TINY)))
    rates = losses.groupby("lr").agg(ended=("train_loss", "count"), ln_loss=("ln_loss", "mean"))
    rates = rates.assign(stopped=expected - rates["ended"])
    return float(rates.sort_values(["stopped", "ln_loss"], kind="stable").index[0])
