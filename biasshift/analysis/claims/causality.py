"""Is bias shift the cause (claim 5)? What updates without it do for ReLU, for ELU, and for ELU
moved away from zero; batch norm (8).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.speed import describe_rates
from biasshift.analysis.evidence import Evidence, Speed
from biasshift.analysis.grid import Cell
from biasshift.analysis.statistics import paired, share

UPDATES = ("centered", "quasi-diagonal", "centered-p", "full")
RELU, ELU = Cell("relu"), Cell("elu")
RELU_NORMED, ELU_NORMED = Cell("relu", batch_norm=True), Cell("elu", batch_norm=True)
CAUSAL = "section 3; Theorem 2"
NO_RUNS = (
    "No two runs with one seed, or no loss that all of them reached, or no seconds in the table."
)
NO_GAP = "ELU is not clearly faster than ReLU in these runs: there is no gap to close."
TIME = (
    "Seconds of training alone, measurements left out; they depend on the machine and on what else "
    "it did."
)
EQUAL_RUN = "Runs with and without it are compared at learning rates that both were trained at."


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A statement about how fast cells learn, with the effect that decides it.

    The effect is computed from one series per cell, in the order of ``cells``: the logarithm of
    steps or of a loss, seed by seed, smaller is faster.
    """

    number: int = 5
    family: str
    statement: str
    source: str = CAUSAL
    statistic: str = "{}"  # of the measure
    cells: list[Cell]
    effect: Callable[..., pd.Series]
    predicted: int = -1
    remark: Callable[..., str] = lambda *_: ""  # begins the caveat; made of the same series
    note: str = EQUAL_RUN  # ends it

    def claims(self, evidence: Evidence) -> Iterator[Claim]:
        """Yields one claim per measure in steps; none where a cell was not trained."""
        if not set(self.cells) <= evidence.cells:
            return
        rates = describe_rates(evidence, self.cells)
        for suffix, speed in _speeds(evidence, self.cells):
            if not speed.in_time:
                columns = [speed.table[cell] for cell in self.cells]
                caveat = filter(None, [self.remark(*columns), rates, self.note])
                yield Claim(
                    number=self.number,
                    name=self.family + suffix,
                    family=self.family,
                    statement=self.statement,
                    source=self.source,
                    statistic=self.statistic.format(speed.statistic),
                    estimate=paired(self.effect(*columns), self.predicted),
                    caveat=" ".join(caveat),
                    missing=NO_RUNS,
                    predicted=self.predicted,
                )


BATCH_NORM = (
    Contrast(
        number=8,
        family="batch-norm-centered",
        statement="ReLU networks learn faster by the centered update than with batch normalization",
        source="section 4.2, Figure 5",
        cells=[Cell("relu", "centered"), RELU_NORMED],
        effect=lambda centered, normed: centered - normed,
    ),
    Contrast(
        number=8,
        family="batch-norm-elu",
        statement="ELU networks without batch normalization learn faster than ReLU networks with "
        "it",
        source="section 4.2, Figure 5",
        cells=[ELU, RELU_NORMED],
        effect=lambda elu, normed: elu - normed,
    ),
    Contrast(
        number=8,
        family="batch-norm-helps",
        statement="batch normalization helps ELU less than ReLU",
        source="section 4.2, Figure 5",
        cells=[RELU_NORMED, RELU, ELU, ELU_NORMED],
        # (ELU − ELU normed) − (ReLU − ReLU normed)
        effect=lambda relu_normed, relu, elu, elu_normed: relu_normed - relu + elu - elu_normed,
    ),
)


def batch_norm_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 8, what batch normalization does; none where no network has it."""
    for contrast in BATCH_NORM:
        yield from contrast.claims(evidence)


def gap_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 5: how much of the gap from ReLU to ELU an update closes.

    An update that removes bias shift should close the gap, and help ELU less than ReLU. Each update
    is judged that the runs have.
    """
    for update in UPDATES:
        updated = Cell("relu", update)
        if {RELU, ELU, updated} <= evidence.cells:
            yield from _closed(evidence, update, updated)
        yield from Contrast(
            family=f"helps-less-{update}",
            statement=f"the {update} update helps ELU less than ReLU",
            statistic="gain of ELU − gain of ReLU in {}",
            cells=[RELU, ELU, updated, Cell("elu", update)],
            effect=lambda relu, elu, relu_updated, elu_updated: (
                (elu - elu_updated) - (relu - relu_updated)
            ),
            remark=lambda relu, elu, relu_updated, elu_updated: (
                f"The gains: ELU {(elu - elu_updated).mean():+.2g}, "
                f"ReLU {(relu - relu_updated).mean():+.2g}; below 0 the update harms."
            ),
            note="",
        ).claims(evidence)


def _closed(evidence: Evidence, update: str, updated: Cell) -> Iterator[Claim]:
    rates = describe_rates(evidence, [RELU, ELU, updated])
    for suffix, speed in _speeds(evidence, [RELU, ELU, updated]):
        relu = speed.table[RELU]
        estimate = share(relu - speed.table[updated], relu - speed.table[ELU])
        unbounded = estimate.low != estimate.low
        family = f"closes-{update}-{'time' if speed.in_time else 'steps'}"
        when = "time" if speed.in_time else "steps"
        caveat = [NO_GAP if unbounded else "", rates, TIME if speed.in_time else ""]
        yield Claim(
            number=5,
            name=family + suffix,
            family=family,
            statement=f"the {update} update closes the gap from ReLU to ELU, at equal {when}",
            source=CAUSAL,
            statistic=f"% of the gap in {speed.statistic}",
            estimate=estimate,
            caveat=" ".join(filter(None, caveat)),
            missing=NO_GAP if estimate.n else NO_RUNS,
            predicted=1,
        )


def _speeds(evidence: Evidence, cells: list[Cell]) -> Iterator[tuple[str, Speed]]:
    """How fast cells learn by every measure, with the suffix of its claims: none for the steps or
    seconds to the lowest loss.
    """
    speeds = evidence.speeds(cells)
    lowest = min((speed.level for speed in speeds if speed.level), default=None)
    for speed in speeds:
        level = "loss" if speed.level is None else f"{speed.level:g}"
        yield "" if speed.level == lowest is not None else f"-{level}", speed


def constant_claims(evidence: Evidence) -> Iterator[Claim]:
    """Yields claim 5, the reverse: a constant added to ELU's activations slows learning.

    The next biases can absorb the constant, and so only an update with bias shift should be slowed;
    the centered update less.
    """
    for constant in sorted({cell.constant for cell in evidence.cells if cell.constant}):
        moved = Cell("elu", constant=constant)
        yield from Contrast(
            family=f"constant-{constant:g}",
            statement=f"adding {constant:g} to ELU's activations slows plain gradient descent",
            cells=[ELU, moved],
            effect=lambda plain, plain_moved: plain_moved - plain,
            predicted=1,
        ).claims(evidence)
        yield from Contrast(
            family=f"constant-{constant:g}-centered",
            statement=f"adding {constant:g} to ELU's activations slows the centered update less "
            "than plain gradient descent",
            statistic="slowing of centered − slowing of plain in {}",
            cells=[ELU, moved, Cell("elu", "centered"), Cell("elu", "centered", constant)],
            effect=lambda plain, plain_moved, centered, centered_moved: (
                (centered_moved - centered) - (plain_moved - plain)
            ),
            remark=_slowing_of_centered,
        ).claims(evidence)


def _slowing_of_centered(
    plain: pd.Series, plain_moved: pd.Series, centered: pd.Series, centered_moved: pd.Series
) -> str:
    left = paired(centered_moved - centered)
    return (
        f"The centered update itself is slowed by {left.effect:+.2g} "
        f"[{left.low:+.2g}, {left.high:+.2g}]."
    )
