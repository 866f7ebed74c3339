"""What runs of one experiment may differ in, and which learning rate each kind of run is judged at.

A *cell* is an activation function, an update, a constant that is added to the activations, and
whether there is batch normalization. Every cell is trained at the same learning rates with the same
seeds, and one rule chooses for all of them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"elu": "ELU", "relu": "ReLU", "lrelu": "LReLU", "srelu": "SReLU"}
CELL = ("activation", "update", "constant", "batch_norm")
UNKNOWN = 0.0  # learning rate of runs that do not record one: the same for all
TINY = 1e-300  # a loss of exactly 0 has no logarithm
RULE = "of those tried for all alike: fewest runs that stopped early, then the lowest geometric mean of the training losses at the end"


class Cell(NamedTuple):
    """One kind of network and update."""

    activation: str
    update: str = "plain"
    constant: float = 0.0
    batch_norm: bool = False

    @property
    def name(self) -> str:
        """ "ReLU, centered"."""
        parts = [NAMES.get(self.activation, self.activation)]
        parts += [self.update] if self.update != "plain" else []
        parts += [f"activations + {self.constant:g}"] if self.constant else []
        return ", ".join(parts + (["batch norm"] if self.batch_norm else []))


def cells_of(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run: ``run``, ``seed``, ``lr`` and the columns of its cell; what older runs do
    not record is the default.

    Raises:
        ValueError: for two runs of one cell, learning rate and seed, or cells that were not trained
            at the same learning rates.
    """
    import pandas as pd

    runs = table.drop_duplicates("run")
    columns = {
        "run": runs["run"],
        "seed": runs["seed"],
        "lr": runs["lr"].astype(float).fillna(UNKNOWN) if "lr" in runs else UNKNOWN,
    }
    for name, default in zip(CELL, Cell(""), strict=True):
        values = [default] * len(runs) if name not in runs else list(runs[name])
        columns[name] = [
            default if _is_missing(value) else type(default)(value) for value in values
        ]
    found = pd.DataFrame(columns).reset_index(drop=True)
    _refuse_twice(found)
    _refuse_unequal_rates(found)
    return found


def _is_missing(value: Any) -> bool:
    return value is None or value != value


def _refuse_twice(runs: "pd.DataFrame") -> None:
    twice = runs.loc[runs.duplicated([*CELL, "lr", "seed"])]
    if len(twice):
        raise ValueError(
            f"There are two runs of '{_said(cell_of(twice))}' with seed {twice['seed'].iloc[0]}: "
            "give one of them."
        )


def _refuse_unequal_rates(runs: "pd.DataFrame") -> None:
    """Cells with a constant or batch norm may have been tried at fewer rates than others, but
    equally among themselves.
    """
    for _, group in runs.groupby(["constant", "batch_norm"]):
        rates = {
            cell_of(cell): tuple(sorted(cell["lr"].unique()))
            for _, cell in group.groupby(list(CELL))
        }
        (first, expected), *others = rates.items()
        for cell, found in others:
            if found != expected:
                raise ValueError(
                    f"The learning rates are not the same for all: '{_said(first)}' was trained at "
                    f"{_listed(expected)}, '{_said(cell)}' at "
                    f"{_listed(found)}. A rate that was searched for one of them only would "
                    "decide: complete the grid."
                )


def cell_of(runs: "pd.DataFrame") -> Cell:
    """That of the first run."""
    return Cell(*(runs[name].iloc[0] for name in CELL))


def _said(cell: Cell) -> str:
    return ", ".join([cell.activation, *cell.name.split(", ")[1:]])


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def paper_runs(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """The runs of plain gradient descent, nothing added, at one learning rate for all: what the
    paper compared.

    The rate is that of `best_rate` over these runs together. Without batch normalization, unless
    all networks have it.
    """
    plain = numbers.loc[
        (numbers["update"] == "plain").to_numpy() & (numbers["constant"] == 0).to_numpy()
    ]
    normed = plain["batch_norm"].to_numpy(bool)
    plain = plain if normed.all() else plain.loc[~normed]
    return plain.loc[(plain["lr"] == best_rate(plain)).to_numpy()] if len(plain) else plain


def best_rate(numbers: "pd.DataFrame") -> float:
    """The learning rate to judge runs at: `RULE`. Activations count alike: logarithms of losses are
    averaged.

    A run that diverged stopped early, and so did one that is not there although its seed is at
    another rate: no rate is chosen for the runs that survived it.
    """
    import numpy as np

    wanted = len(numbers.drop_duplicates([name for name in (*CELL, "seed") if name in numbers]))
    losses = numbers.assign(ln_loss=np.log(numbers["train_loss"].astype(float).clip(lower=TINY)))
    rates = losses.groupby("lr").agg(ended=("train_loss", "count"), ln_loss=("ln_loss", "mean"))
    rates = rates.assign(stopped=wanted - rates["ended"])
    return float(rates.sort_values(["stopped", "ln_loss"], kind="stable").index[0])
