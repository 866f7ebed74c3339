"""Is bias shift the cause (claim 5)? What updates without it do for ReLU, for ELU, and for ELU
moved away from zero; batch norm (8).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.speed import LEVELS, rates_said
from biasshift.analysis.evidence import AT_EQUAL_TIME, AT_THE_END, Evidence
from biasshift.analysis.grid import Cell
from biasshift.analysis.statistics import paired, share

if TYPE_CHECKING:
    import pandas as pd

UPDATES = ("centered", "quasi-diagonal", "centered-p", "full")
RELU, ELU = Cell("relu"), Cell("elu")
CAUSAL = "section 3; Theorem 2"
NO_RUNS = (
    "No two runs with one seed, or no loss that all of them reached, or no seconds in the table."
)
NO_GAP = "ELU is not clearly faster than ReLU in these runs: there is no gap to close."
TIME = "Seconds of training alone, measurements left out; they depend on the machine and on what else it did."
EQUAL_RUN = "Runs with and without it are compared at learning rates that both were trained at."


class Measure(NamedTuple):
    """How fast every cell was by one measure, seed by seed; `suffix` tells its claims from those by
    the lowest loss.
    """

    name: str
    suffix: str
    in_time: bool
    table: "pd.DataFrame"


def measures(evidence: Evidence, cells: list[Cell]) -> list[Measure]:
    """Steps and seconds to two losses, from the higher one on, and the losses at the end and at
    equal time.
    """
    found = []
    for name, table in evidence.speeds(cells, LEVELS).items():
        in_time, level = "seconds" in name or name == AT_EQUAL_TIME, name.rpartition(" ")[2]
        suffix = "-loss" if name in (AT_THE_END, AT_EQUAL_TIME) else f"-{level}"
        found.append(Measure(name, suffix, in_time, table))
    lowest = {
        one.in_time: one.name for one in found if one.suffix != "-loss"
    }  # the last of each kind
    return [
        one._replace(suffix="") if one.name == lowest.get(one.in_time) else one for one in found
    ]


def closes_the_gap(evidence: Evidence) -> Iterator[Claim]:
    """Claim 5: how much of the gap from ReLU to ELU an update closes, and whether it helps ELU
    less.
    """
    for update in UPDATES:
        cells = [RELU, ELU, Cell("relu", update)]
        if set(cells) <= evidence.cells:
            yield from _closed(evidence, update, cells)
        cells = [*cells, Cell("elu", update)]
        if set(cells) <= evidence.cells:
            yield from _helps_less(evidence, update, cells)


def _closed(evidence: Evidence, update: str, cells: list[Cell]) -> Iterator[Claim]:
    rates = rates_said(evidence, cells)
    for measure, suffix, in_time, table in measures(evidence, cells):
        when, family = (
            "at equal time" if in_time else "at equal steps",
            f"closes-{update}-{'time' if in_time else 'steps'}",
        )
        found = share(table[RELU] - table[cells[-1]], table[RELU] - table[ELU])
        bounded = found.low == found.low
        missing = NO_GAP if found.n else NO_RUNS
        caveat = (rates if bounded else f"{NO_GAP} {rates}") + (f" {TIME}" if in_time else "")
        statement = f"the {update} update closes the gap from ReLU to ELU, {when}"
        yield Claim(
            5,
            family + suffix,
            family,
            statement,
            CAUSAL,
            f"% of the gap in {measure}",
            found,
            caveat,
            missing,
            1,
        )


def _helps_less(evidence: Evidence, update: str, cells: list[Cell]) -> Iterator[Claim]:
    rates, (relu, elu, relu_updated, elu_updated) = rates_said(evidence, cells), cells
    for measure, suffix, table in _in_steps(evidence, cells):
        gain, gain_of_relu = table[elu] - table[elu_updated], table[relu] - table[relu_updated]
        found = paired(gain - gain_of_relu)
        name = f"helps-less-{update}{suffix}"
        statement = f"the {update} update helps ELU less than ReLU"
        caveat = f"The gains: ELU {gain.mean():+.2g}, ReLU {gain_of_relu.mean():+.2g}; below 0 the update harms. {rates}"
        yield Claim(
            5,
            name,
            f"helps-less-{update}",
            statement,
            CAUSAL,
            f"gain of ELU − gain of ReLU in {measure}",
            found,
            caveat,
            NO_RUNS,
        )


def slowed_by_a_constant(evidence: Evidence) -> Iterator[Claim]:
    """Claim 5, the reverse: a constant that the next biases can absorb slows SGD, and the centered
    update less.
    """
    for constant in sorted({cell.constant for cell in evidence.cells if cell.constant}):
        moved = Cell("elu", constant=constant)
        cells = [ELU, moved]
        if set(cells) <= evidence.cells:
            yield from _slowed(evidence, cells, f"{constant:g}")
        cells = [ELU, moved, Cell("elu", "centered"), Cell("elu", "centered", constant)]
        if set(cells) <= evidence.cells:
            yield from _slowed_less(evidence, cells, f"{constant:g}")


def _slowed(evidence: Evidence, cells: list[Cell], constant: str) -> Iterator[Claim]:
    rates = f"{rates_said(evidence, cells)} {EQUAL_RUN}"
    for measure, suffix, table in _in_steps(evidence, cells):
        found = paired(table[cells[1]] - table[cells[0]], predicted=1)
        name = f"constant-{constant}{suffix}"
        statement = f"adding {constant} to ELU's activations slows plain gradient descent"
        yield Claim(
            5, name, f"constant-{constant}", statement, CAUSAL, measure, found, rates, NO_RUNS, 1
        )


def _slowed_less(evidence: Evidence, cells: list[Cell], constant: str) -> Iterator[Claim]:
    rates, (plain, plain_moved, centered, centered_moved) = (
        f"{rates_said(evidence, cells)} {EQUAL_RUN}",
        cells,
    )
    for measure, suffix, table in _in_steps(evidence, cells):
        slowed, slowed_centered = (
            table[plain_moved] - table[plain],
            table[centered_moved] - table[centered],
        )
        found, left = paired(slowed_centered - slowed), paired(slowed_centered)
        name = f"constant-{constant}-centered{suffix}"
        statement = f"adding {constant} to ELU's activations slows the centered update less than plain gradient descent"
        caveat = f"The centered update itself is slowed by {left.effect:+.2g} [{left.low:+.2g}, {left.high:+.2g}]. {rates}"
        statistic = f"slowing of centered − slowing of plain in {measure}"
        yield Claim(
            5,
            name,
            f"constant-{constant}-centered",
            statement,
            CAUSAL,
            statistic,
            found,
            caveat,
            NO_RUNS,
        )


def _in_steps(evidence: Evidence, cells: list[Cell]) -> "list[tuple[str, str, pd.DataFrame]]":
    return [
        (one.name, one.suffix, one.table) for one in measures(evidence, cells) if not one.in_time
    ]


def against_batch_norm(evidence: Evidence) -> Iterator[Claim]:
    """Claim 8: left out where no network has batch normalization."""
    normed = {name: Cell(name, batch_norm=True) for name in ("relu", "elu")}
    helped = "batch normalization helps ELU less than ReLU"
    for name, statement, cells in (
        ("batch-norm-centered", "ReLU networks learn faster by the centered update than with batch "
                                "normalization",
         [Cell("relu", "centered"), normed["relu"]]),
        ("batch-norm-elu", "ELU networks without batch normalization learn faster than ReLU "
                           "networks with it", [ELU, normed["relu"]]),
        ("batch-norm-helps", helped, [normed["relu"], RELU, ELU, normed["elu"]]),
    ):  # fmt: skip
        if not set(cells) <= evidence.cells:
            continue
        rates = f"{rates_said(evidence, cells)} {EQUAL_RUN}"
        for measure, suffix, table in _in_steps(evidence, cells):
            effects = table[cells[0]] - table[cells[1]]
            if statement == helped:
                effects = (
                    effects + table[cells[2]] - table[cells[3]]
                )  # (ELU − ELU normed) − (ReLU − ReLU normed)
            yield Claim(
                8,
                name + suffix,
                name,
                statement,
                "section 4.2, Figure 5",
                measure,
                paired(effects),
                rates,
                NO_RUNS,
            )
