"""Is bias shift the cause (claim 5)? What updates without it do for ReLU, for ELU, and for ELU moved away from zero; batch norm (8)."""

from collections.abc import Iterator

from biasshift.cells import Cell
from biasshift.judging.about_speed import rates_said
from biasshift.judging.claim import Claim
from biasshift.judging.evidence import AT_EQUAL_TIME, AT_THE_END, Evidence
from biasshift.judging.statistics import paired, share

UPDATES = ("centered", "quasi-diagonal", "centered-p", "full")
RELU, ELU = Cell("relu"), Cell("elu")
CAUSAL = "section 3; Theorem 2"
NO_RUNS = "No two runs with one seed, or no loss that all of them reached, or no seconds in the table."
NO_GAP = "ELU is not clearly faster than ReLU in these runs: there is no gap to close."
TIME = "Seconds of training alone, measurements left out; they depend on the machine and on what else it did."
EQUAL_RUN = "Runs with and without it are compared at learning rates that both were trained at."


def closes_the_gap(evidence: Evidence) -> Iterator[Claim]:
    """Claim 5: how much of the gap from ReLU to ELU an update closes, and whether it helps ELU less."""
    for update in UPDATES:
        cells = [RELU, ELU, Cell("relu", update)]
        if set(cells) <= evidence.cells:
            yield from _closed(evidence, update, cells)
        cells = [*cells, Cell("elu", update)]
        if set(cells) <= evidence.cells:
            yield from _helps_less(evidence, update, cells)


def _closed(evidence: Evidence, update: str, cells: list[Cell]) -> Iterator[Claim]:
    rates = rates_said(evidence, cells)
    for measure, table in evidence.speeds(cells, 1).items():
        in_time = "seconds" in measure or measure == AT_EQUAL_TIME
        when = "at equal time" if in_time else "at equal steps"
        name = f"closes-{update}-{'time' if in_time else 'steps'}{'-loss' if measure in (AT_THE_END, AT_EQUAL_TIME) else ''}"
        found = share(table[RELU] - table[cells[-1]], table[RELU] - table[ELU])
        bounded = found.low == found.low
        missing = NO_GAP if found.n else NO_RUNS
        caveat = (rates if bounded else f"{NO_GAP} {rates}") + (f" {TIME}" if in_time else "")
        statement = f"the {update} update closes the gap from ReLU to ELU, {when}"
        family = f"closes-{update}-{'time' if in_time else 'steps'}"
        yield Claim(5, name, family, statement, CAUSAL, f"% of the gap in {measure}", found, caveat, missing, 1)


def _helps_less(evidence: Evidence, update: str, cells: list[Cell]) -> Iterator[Claim]:
    rates, (relu, elu, relu_updated, elu_updated) = rates_said(evidence, cells), cells
    for measure, table in evidence.speeds(cells, 1).items():
        if "seconds" in measure or measure == AT_EQUAL_TIME:
            continue
        found = paired((table[elu] - table[elu_updated]) - (table[relu] - table[relu_updated]))
        name = f"helps-less-{update}{'-loss' if measure == AT_THE_END else ''}"
        statement = f"the {update} update helps ELU less than ReLU"
        yield Claim(5, name, f"helps-less-{update}", statement, CAUSAL, f"gain of ELU − gain of ReLU in {measure}", found, rates, NO_RUNS)


def slowed_by_a_constant(evidence: Evidence) -> Iterator[Claim]:
    """Claim 5, the reverse: a constant that the next biases can absorb slows SGD, and the centered update less."""
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
    for measure, table in _steps_only(evidence, cells):
        found = paired(table[cells[1]] - table[cells[0]], predicted=1)
        name = f"constant-{constant}{'-loss' if measure == AT_THE_END else ''}"
        statement = f"adding {constant} to ELU's activations slows plain gradient descent"
        yield Claim(5, name, f"constant-{constant}", statement, CAUSAL, measure, found, rates, NO_RUNS, 1)


def _slowed_less(evidence: Evidence, cells: list[Cell], constant: str) -> Iterator[Claim]:
    rates, (plain, plain_moved, centered, centered_moved) = f"{rates_said(evidence, cells)} {EQUAL_RUN}", cells
    for measure, table in _steps_only(evidence, cells):
        slowed, slowed_centered = table[plain_moved] - table[plain], table[centered_moved] - table[centered]
        found, left = paired(slowed_centered - slowed), paired(slowed_centered)
        name = f"constant-{constant}-centered{'-loss' if measure == AT_THE_END else ''}"
        statement = f"adding {constant} to ELU's activations slows the centered update less than plain gradient descent"
        caveat = f"The centered update itself is slowed by {left.effect:+.2g} [{left.low:+.2g}, {left.high:+.2g}]. {rates}"
        statistic = f"slowing of centered − slowing of plain in {measure}"
        yield Claim(5, name, f"constant-{constant}-centered", statement, CAUSAL, statistic, found, caveat, NO_RUNS)


def _steps_only(evidence: Evidence, cells: list[Cell]) -> Iterator[tuple]:
    return ((name, table) for name, table in evidence.speeds(cells, 1).items() if "seconds" not in name and name != AT_EQUAL_TIME)


def against_batch_norm(evidence: Evidence) -> Iterator[Claim]:
    """Claim 8: left out where no network has batch normalization."""
    normed = {name: Cell(name, batch_norm=True) for name in ("relu", "elu")}
    helped = "batch normalization helps ELU less than ReLU"
    for name, statement, cells in (
        ("batch-norm-centered", "ReLU networks learn faster by the centered update than with batch normalization",
         [Cell("relu", "centered"), normed["relu"]]),
        ("batch-norm-elu", "ELU networks without batch normalization learn faster than ReLU networks with it", [ELU, normed["relu"]]),
        ("batch-norm-helps", helped, [normed["relu"], RELU, ELU, normed["elu"]]),
    ):  # fmt: skip
        if not set(cells) <= evidence.cells:
            continue
        rates = f"{rates_said(evidence, cells)} {EQUAL_RUN}"
        for measure, table in _steps_only(evidence, cells):
            effects = table[cells[0]] - table[cells[1]]
            if statement == helped:
                effects = effects + table[cells[2]] - table[cells[3]]  # (ELU − ELU normed) − (ReLU − ReLU normed)
            full = f"{name}{'-loss' if measure == AT_THE_END else ''}"
            yield Claim(8, full, name, statement, "section 4.2, Figure 5", measure, paired(effects), rates, NO_RUNS)
