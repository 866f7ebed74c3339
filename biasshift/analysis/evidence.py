"""What claims are judged by: every run reduced to its numbers, its learning curve and what was
measured of its layers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from biasshift.analysis.claim import EQUAL_LOSS
from biasshift.analysis.grid import CELL, NAMES, Cell, best_rate, cell_of, paper_runs
from biasshift.analysis.layer_points import EXAMINED, NEEDED, POINT, exam_points, points_of
from biasshift.analysis.learning_curves import TINY, common_levels, curves_of, loss_after, reached
from biasshift.analysis.quantities import NUMBERS_READ, REFERENCE_DAMPING, per_run
from biasshift.runs.reader import read_runs, run_states

# Columns that `points_of` reads, besides those of the run.
MEASURED = ("run", "activation", "seed", "step", "layer", "unit", "inputs", *NEEDED)
# Those that anything here reads, besides the options of the runs.
READ = {*MEASURED, *NUMBERS_READ, *POINT, *EXAMINED, "exam_enough", "seconds"}

TO_STEPS = "ln of the steps to training loss {:g}"
TO_SECONDS = "ln of the seconds to training loss {:g}"
AT_THE_END = "ln of the training loss at the end"
AT_EQUAL_TIME = "ln of the training loss at equal time"
LEVELS = 2  # losses that runs are timed to, besides the equal loss of the examination
PROBES, DAMPINGS = 2, 3  # on which an effect must keep its sign
EQUAL = 1.1  # losses that differ by less than this factor are called equal
REPEATED = "The sign is the same on two disjoint probes and at dampings {} and {:g}."
SIGN_CHANGES = "The sign changes with the damping or the probe."
NOT_REPEATED = "Not repeated on two probes at three dampings, without which nothing is decided."


def read_evidence(*paths: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of runs for `Evidence.of`, with the columns that it reads.

    Raises:
        ValueError: as `biasshift.runs.reader.read_runs`.
    """
    options = set(run_states(*paths))
    return read_runs(*paths, columns=sorted(READ | options), absent="skip")


class Condition(NamedTuple):
    """A condition of a verdict: whether it holds, and a sentence about it for the caveat."""

    sentence: str
    holds: bool


class Speed(NamedTuple):
    """How fast cells learn by one measure."""

    statistic: str
    level: float | None  # the loss to get to, in nats; None: the loss itself is compared
    in_time: bool  # seconds count, not steps
    table: pd.DataFrame  # seeds × cells, smaller is faster


def repeated(
    points: pd.DataFrame, effects: Callable[[pd.DataFrame], pd.Series], expected: float
) -> Condition:
    """Repeats an effect at equal loss, probe by probe and damping by damping.

    The condition holds if the sign is always that of ``expected``, on at least two probes at three
    dampings: what is read off Fisher matrices may depend on either.

    Args:
        points: those of the examinations.
        effects: points → one number per seed.
        expected: the effect that is repeated; its sign counts.
    """
    groups = dict(list(points.groupby(["exam_probe", "exam_damping"])))
    dampings = sorted({damping for _, damping in groups})
    if len({probe for probe, _ in groups}) < PROBES or len(dampings) < DAMPINGS:
        return Condition(NOT_REPEATED, False)
    means = [float(effects(group).mean()) for group in groups.values()]
    if not np.isfinite(means).all():
        return Condition(NOT_REPEATED, False)
    if not all(mean * expected > 0 for mean in means):
        return Condition(SIGN_CHANGES, False)
    *smaller, largest = dampings
    return Condition(REPEATED.format(", ".join(map("{:g}".format, smaller)), largest), True)


def at_equal_losses(points: pd.DataFrame, first: str, second: str) -> Condition:
    """Returns whether two activation functions were examined at equal losses.

    Whether a run has come down to the equal loss is checked at intervals, and so runs are examined
    at losses somewhat below it. The geometric means over the points of an activation function may
    differ by up to a tenth.
    """
    losses = points.groupby("activation")["loss"].agg(
        lambda loss: float(np.exp(np.log(loss.astype(float)).mean()))
    )
    a, b = (float(losses.get(name, np.nan)) for name in (first, second))
    if not abs(np.log(a / b)) > np.log(EQUAL):  # holds, too, where it is not recorded
        return Condition(EQUAL_LOSS, True)
    return Condition(
        f"{NAMES[first]} was examined at a loss of {a:.3g}, {NAMES[second]} at {b:.3g}, which is "
        "not equal: nothing is decided.",
        False,
    )


@dataclass(frozen=True, eq=False)
class Evidence:
    """Runs, reduced to what the claims need. Build it with `Evidence.of`."""

    numbers: pd.DataFrame  # one row per run, `biasshift.analysis.quantities.per_run`
    curves: dict[str, pd.DataFrame]  # by the name of the run
    points: pd.DataFrame  # one row per run of the paper's kind, step and layer
    exam_points: pd.DataFrame  # one row per run of the paper's kind, layer, probe and damping

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Evidence":
        """Reduces a table of runs.

        Raises:
            ValueError: if a training loss is below 0, or the runs cannot be compared; see
                `biasshift.analysis.quantities.per_run`.
        """
        if "train_loss" in table and (below := table.loc[table["train_loss"] < 0, "run"]).size:
            raise ValueError(
                f"The training loss of run '{below.iloc[0]}' falls below 0: claims compare "
                "logarithms of losses, and steps to losses. Give runs whose loss cannot be "
                "negative, such as a cross-entropy or a squared error."
            )
        numbers = per_run(table)
        paper = set(paper_runs(numbers)["run"].astype(str))
        measured = []
        ours = table.loc[table["run"].astype(str).isin(paper).to_numpy()]
        ours = ours[[name for name in MEASURED if name in ours]]
        for name, run in ours.groupby("run", observed=True, sort=False):
            if len(points := points_of(run)):
                activation, seed = run["activation"].iloc[0], run["seed"].iloc[0]
                measured.append(points.assign(run=name, activation=activation, seed=seed))
        points = pd.concat(measured, ignore_index=True) if measured else pd.DataFrame()
        examined = exam_points(table)
        examined = examined[examined["run"].isin(paper)]
        return cls(numbers, curves_of(table), points, examined)

    @cached_property
    def paper(self) -> pd.DataFrame:
        """The numbers of the runs of plain gradient descent at one learning rate."""
        return paper_runs(self.numbers)

    @property
    def reference(self) -> pd.DataFrame:
        """The points of the examinations at the damping whose numbers are shown."""
        return self.exam_points[self.exam_points["exam_damping"] == REFERENCE_DAMPING]

    def has(self, *activations: str) -> bool:
        """Tells whether runs of the paper's kind were trained with each of the activations."""
        return set(activations) <= set(self.paper["activation"])

    def seeds(self, *activations: str) -> list[int]:
        """Returns the seeds that all of these activation functions were trained with.

        Without any activation function, those of all runs of the paper's kind.
        """
        seeds = self.paper["seed"]
        trained = [set(seeds[self.paper["activation"] == name]) for name in activations]
        return sorted(set.intersection(*trained) if trained else set(seeds))

    @property
    def cells(self) -> set[Cell]:
        """The cells that were trained."""
        return set(self._by_cell)

    @cached_property
    def _by_cell(self) -> dict[Cell, pd.DataFrame]:
        return {cell_of(runs): runs for _, runs in self.numbers.groupby(list(CELL))}

    def best(self, cells: Sequence[Cell]) -> dict[Cell, pd.DataFrame]:
        """Returns the runs of every cell at its best learning rate, by seed.

        Only rates that all of these cells were trained at count; where there is none, there are no
        runs.
        """
        rates, best = self._rates(cells), {}
        for cell in cells:
            runs = self._by_cell[cell]
            chosen = runs["lr"] == self._best_rate(cell, tuple(rates)) if rates else slice(0)
            best[cell] = runs[chosen].set_index("seed")
        return best

    def _best_rate(self, cell: Cell, rates: tuple[float, ...]) -> float:
        """The best of these rates for a cell: several claims ask."""
        if (cell, rates) not in self._chosen:
            runs = self._by_cell[cell]
            self._chosen[cell, rates] = best_rate(runs[runs["lr"].isin(rates)])
        return self._chosen[cell, rates]

    @cached_property
    def _chosen(self) -> dict[tuple[Cell, tuple[float, ...]], float]:
        return {}

    def _rates(self, cells: Sequence[Cell]) -> list[float]:
        """The learning rates that all of these cells were trained at."""
        return sorted(set.intersection(*(set(self._by_cell[cell]["lr"]) for cell in cells)))

    def edges(self, cells: Sequence[Cell]) -> list[str]:
        """Returns the cells whose best learning rate is the first or the last of several.

        A better rate may lie outside of those tried. Each is given as "ELU (1)", the name of the
        cell with its rate.
        """
        rates = self._rates(cells)
        best = {cell: runs["lr"].iloc[0] for cell, runs in self.best(cells).items() if len(runs)}
        return [
            f"{cell.name} ({rate:g})"
            for cell, rate in best.items()
            if len(rates) > 1 and rate in (rates[0], rates[-1])
        ]

    def speeds(self, cells: Sequence[Cell]) -> list[Speed]:
        """Returns how fast cells learn at their best rates, on the seeds that all cells have.

        The measures, all as logarithms: steps, then seconds, to the lowest losses that all of these
        runs reach, from the highest loss on; the loss at the end; and the loss after the seconds of
        the quickest of the runs of a seed.
        """
        best = self.best(cells)
        seeds = sorted(set.intersection(*(set(runs.index) for runs in best.values())))
        best = {cell: runs.loc[seeds] for cell, runs in best.items()}
        curves = {
            cell: [self.curves[str(name)] for name in runs["run"]] for cell, runs in best.items()
        }
        end = {cell: list(runs["train_loss"]) for cell, runs in best.items()}
        finished = [
            curve
            for cell in cells
            for curve, loss in zip(curves[cell], end[cell], strict=True)
            if loss >= 0
        ]
        quickest = [
            min(float(curve["seconds"].max()) for curve in of_seed)
            for of_seed in zip(*curves.values(), strict=True)
        ]
        equal_time = {
            cell: [loss_after(*pair) for pair in zip(curves[cell], quickest, strict=True)]
            for cell in best
        }
        measures = [
            (
                title.format(level),
                level,
                axis == "seconds",
                {cell: [reached(curve, level, axis) for curve in curves[cell]] for cell in best},
            )
            for axis, title in (("step", TO_STEPS), ("seconds", TO_SECONDS))
            for level in common_levels(finished, LEVELS)
        ]
        measures += [(AT_THE_END, None, False, end), (AT_EQUAL_TIME, None, True, equal_time)]
        index = pd.Index(seeds)
        return [
            Speed(name, level, in_time, np.log(pd.DataFrame(by_cell, index=index).clip(lower=TINY)))
            for name, level, in_time, by_cell in measures
        ]
