"""What the claims are judged by: every run reduced to its numbers, its learning curve and what was
measured of its layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biasshift.analysis.grid import NAMES, Cell, best_rate, cell_of, paper_runs
from biasshift.analysis.layer_points import exam_points, points_of
from biasshift.analysis.learning_curves import common_levels, curve_of, loss_after, reached
from biasshift.analysis.per_run import REFERENCE_DAMPING, per_run

if TYPE_CHECKING:
    import pandas as pd

TO_STEPS, TO_SECONDS = (
    "ln of the steps to training loss {:g}",
    "ln of the seconds to training loss {:g}",
)
AT_THE_END, AT_EQUAL_TIME = (
    "ln of the training loss at the end",
    "ln of the training loss at equal time",
)
PROBES, DAMPINGS = 2, 3
EQUAL = 1.1  # losses that differ by less than this factor are called equal
REPEATED = "The sign is the same on two disjoint probes and at dampings {}."
SIGN_CHANGES = "The sign changes with the damping or the probe."
NOT_REPEATED = "Not repeated on two probes at three dampings, without which nothing is decided."


# -- what is read off Fisher matrices must repeat ----------------------------------------------


class Repetition(NamedTuple):
    """Whether an effect keeps its sign where it is repeated, in words and as a fact."""

    said: str
    sure: bool


def repeated(
    points: "pd.DataFrame", effects: Callable[["pd.DataFrame"], "pd.Series"], expected: float
) -> Repetition:
    """Repeats an effect at equal loss, probe by probe and damping by damping.

    Args:
        points: those of the examinations.
        effects: points → one number per seed.
        expected: the effect that is repeated; its sign counts.
    """
    groups = dict(list(points.groupby(["exam_probe", "exam_damping"])))
    dampings = sorted({damping for _, damping in groups})
    if len({probe for probe, _ in groups}) < PROBES or len(dampings) < DAMPINGS:
        return Repetition(NOT_REPEATED, False)
    means = [float(effects(group).mean()) for group in groups.values()]
    if not np.isfinite(means).all():
        return Repetition(NOT_REPEATED, False)
    if not all(mean * expected > 0 for mean in means):
        return Repetition(SIGN_CHANGES, False)
    return Repetition(REPEATED.format(_listed(dampings)), True)


def at_equal_losses(points: "pd.DataFrame", first: str, second: str) -> Repetition:
    """Whether two activation functions were examined at losses that are equal: each is looked at
    now and then, and not at the same time.
    """
    losses = points.groupby("activation")["loss"].agg(
        lambda loss: float(np.exp(np.log(loss.astype(float)).mean()))
    )
    one, other = (float(losses.get(name, np.nan)) for name in (first, second))
    if not abs(np.log(one / other)) > np.log(EQUAL):  # nor where it is not recorded
        return Repetition("At equal training loss.", True)
    said = f"{NAMES[first]} was examined at a loss of {one:.3g}, {NAMES[second]} at {other:.3g}, which is not equal: nothing is decided."
    return Repetition(said, False)


def _listed(numbers: list[float]) -> str:
    *some, last = (f"{number:g}" for number in numbers)
    return f"{', '.join(some)} and {last}"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Runs, reduced. ``paper`` are those of plain gradient descent at one learning rate."""

    numbers: "pd.DataFrame"  # one row per run, `biasshift.analysis.per_run.per_run`
    curves: dict[str, "pd.DataFrame"]
    points: "pd.DataFrame"  # one row per run of the paper's kind, step and layer
    exam_points: "pd.DataFrame"  # one row per run of the paper's kind, layer, probe and damping

    @classmethod
    def of(cls, table: "pd.DataFrame") -> "Evidence":
        """Reduces a table of runs."""
        import pandas as pd

        _refuse_negative_losses(table)
        numbers = per_run(table)
        paper = list(paper_runs(numbers)["run"])
        curves, points = {}, []
        for name, run in table.groupby("run", observed=True, sort=False):
            curves[str(name)] = curve_of(run)
            if name in paper:
                points.append(
                    points_of(run).assign(
                        run=name, activation=run["activation"].iloc[0], seed=run["seed"].iloc[0]
                    )
                )
        measured = [some for some in points if len(some)]
        layers = pd.concat(measured, ignore_index=True) if measured else pd.DataFrame()
        examined = exam_points(table)
        return cls(numbers, curves, layers, examined[examined["run"].isin(paper)])

    @cached_property
    def paper(self) -> "pd.DataFrame":
        return paper_runs(self.numbers)

    @property
    def reference(self) -> "pd.DataFrame":
        """The points of the examinations at the damping whose numbers are shown."""
        return self.exam_points[self.exam_points["exam_damping"] == REFERENCE_DAMPING]

    def seeds(self, *activations: str) -> list[int]:
        """Those that all of these activation functions were trained with; without any, those of all
        runs of the paper's kind.
        """
        runs = self.paper
        both = [
            set(runs.loc[(runs["activation"] == name).to_numpy(), "seed"]) for name in activations
        ]
        return sorted(set.intersection(*both) if both else set(runs["seed"]))

    @cached_property
    def cells(self) -> set[Cell]:
        return {
            cell_of(runs)
            for _, runs in self.numbers.groupby(["activation", "update", "constant", "batch_norm"])
        }

    def best(self, cells: Sequence[Cell]) -> dict[Cell, "pd.DataFrame"]:
        """The runs of every cell at its best learning rate of those that all of these cells were
        trained at, by seed.
        """
        runs, rates = {cell: self._runs(cell) for cell in cells}, self._rates(cells)
        found = {}
        for cell, some in runs.items():
            some = some[some["lr"].isin(rates)]
            found[cell] = (some[some["lr"] == best_rate(some)] if rates else some).set_index("seed")
        return found

    def _rates(self, cells: Sequence[Cell]) -> list[float]:
        """The learning rates that all of these cells were trained at."""
        return sorted(set.intersection(*(set(self._runs(cell)["lr"]) for cell in cells)))

    def _runs(self, cell: Cell) -> "pd.DataFrame":
        same = np.ones(len(self.numbers), bool)
        for name, value in cell._asdict().items():
            same &= (self.numbers[name] == value).to_numpy()
        return self.numbers.loc[same]

    def edges(self, cells: Sequence[Cell]) -> list[str]:
        """Names of the cells whose best learning rate is the first or the last of several: a better
        one may lie outside.
        """
        found, rates = [], self._rates(cells)
        for cell, runs in self.best(cells).items():
            if len(rates) > 1 and len(runs) and runs["lr"].iloc[0] in (rates[0], rates[-1]):
                found.append(f"{cell.name} ({runs['lr'].iloc[0]:g})")
        return found

    def speeds(self, cells: Sequence[Cell], levels: int) -> dict[str, "pd.DataFrame"]:
        """How fast cells learn at their best rates: measure → (seed, cell), smaller is faster,
        seeds that all cells have.

        Steps and seconds to the lowest losses that all of these runs reach, the loss at the end,
        and that after the seconds of the quickest of the runs of a seed.
        """
        import pandas as pd

        best = self.best(cells)
        seeds = sorted(set.intersection(*(set(runs.index) for runs in best.values())))
        curves = {
            cell: {seed: self.curves[str(runs.loc[seed, "run"])] for seed in seeds}
            for cell, runs in best.items()
        }
        finished = [
            by_seed[seed]
            for cell, by_seed in curves.items()
            for seed in seeds
            if best[cell].loc[seed, "train_loss"] >= 0
        ]
        found = {}
        for axis, name in (("step", TO_STEPS), ("seconds", TO_SECONDS)):
            for level in common_levels(finished, levels):
                found[name.format(level)] = {
                    cell: [reached(some[seed], level, axis) for seed in seeds]
                    for cell, some in curves.items()
                }
        found[AT_THE_END] = {
            cell: [best[cell].loc[seed, "train_loss"] for seed in seeds] for cell in cells
        }
        quickest = {
            seed: min(float(some[seed]["seconds"].max()) for some in curves.values())
            for seed in seeds
        }
        found[AT_EQUAL_TIME] = {
            cell: [loss_after(some[seed], quickest[seed]) for seed in seeds]
            for cell, some in curves.items()
        }
        return {
            name: np.log(pd.DataFrame(by_cell, index=pd.Index(seeds)).clip(lower=1e-300))
            for name, by_cell in found.items()
        }


def _refuse_negative_losses(table: "pd.DataFrame") -> None:
    if "train_loss" in table and (below := table.loc[table["train_loss"] < 0, "run"]).size:
        raise ValueError(
            f"The training loss of run '{below.iloc[0]}' falls below 0: claims compare logarithms "
            "of losses, and steps to losses. "
            "Give runs whose loss cannot be negative, such as a cross-entropy or a squared error."
        )
