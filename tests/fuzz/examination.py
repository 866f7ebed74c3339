"""One case → what the package said about it, against the oracle."""

import dis
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import biasshift as bs

from . import further
from .generation import CROSS, Case, called, case
from .oracle import Oracle, layers_of
from .snapshots import differences, state

# The worst comes first: what one of them holds for is the verdict of the case.
VERDICTS = ("WRONG", "CRASHED", "DISTURBED", "UNJUSTIFIED", "refused", "right", "invalid")
BAD = VERDICTS[:3]
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6}  # of a layer's largest number
# Of the distance between the oracle in single and in double precision.
NOISE = {torch.float64: 1e-5, torch.float32: 30.0}


@dataclass
class Outcome:
    """What happened in one case."""

    seed: int
    verdict: str = "right"
    findings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # that were justified
    layers: int = 0  # that can be measured
    measured: int = 0
    checks: int = 0  # numbers that were compared, as arrays
    seconds: float = 0.0

    def add(self, verdict: str, text: str) -> None:
        """Adds a finding; the worst is the verdict."""
        self.findings.append(f"{verdict}: {text}"[:600])
        self.verdict = min(self.verdict, verdict, key=VERDICTS.index)

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


class Refused(Exception):
    """The package refused, with a message of its own."""


class Examination:
    """The comparison of all measurements of one case."""

    def __init__(self, of: Case) -> None:
        self.case, self.outcome = of, Outcome(of.seed)
        assert of.built is not None
        self.model, self.drawn = of.built.model, of.built.drawn
        self.oracle = Oracle(of)
        self._single: Oracle | None = None
        self._together: dict[str, Tensor] | None = None
        self.has_kinks = False  # where rounding decides which way the model bends
        self.size = of.options.get("batch_size") or of.largest_batch
        self.coupling = self.oracle.coupling(self.size)
        self.names = {m: n for n, m in self.model.named_modules()}
        self.unfit = {self.names[m] for m in self.drawn.unfit if m in self.names}
        self.optional = {self.names[m] for m in self.drawn.optional if m in self.names}
        self.seen = self.oracle.seen()
        self.labels = of.options["labels"]
        self.sharing = of.options.get("weight_sharing", "per_example")
        self.full = self.oracle.full_fishers(self.labels, self.sharing)
        self.expected = self.oracle.fishers(self.labels, self.sharing)
        self.largest = max(float(F.abs().max()) for F in self.expected.values() if F.numel())
        self.only: Callable | None = None  # layers=, where the package does not skip by itself

    def run(self) -> Outcome:
        """Compares everything."""
        tolerance = torch.finfo(self.case.dtype).eps ** (1 / 3)
        wrong = self.drawn.refused
        fishers = self.fishers()
        if fishers is None:
            return self.outcome
        if self.coupling > 20 * tolerance:
            self.outcome.add("WRONG", f"coupled ({wrong}) by {self.coupling:.1e}, and measured")
        elif wrong is None or wrong == CROSS or self.size == 1:
            self.compare_fishers(fishers)
            if wrong is None and self.outcome.verdict == "right" and not self.has_kinks:
                further.compare(self, fishers)
        else:
            self.outcome.refusals.append(f"indistinct: {wrong}")
        return self.outcome

    def renew(self) -> None:
        """Makes the oracle anew, whose parameters were changed."""
        self.oracle, self._single = Oracle(self.case), None

    # -- calls -------------------------------------------------------------------------------------

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Calls the package, and compares the state of everything before and after.

        Raises:
            Refused: where it did so in words.
        """
        tensors = self.case.x, self.case.y
        before = state(self.model, *tensors)
        failed: Exception | None = None
        value = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = function()
            except Exception as error:
                failed = error
        self.warnings = [str(w.message) for w in caught]
        if changed := differences(before, state(self.model, *tensors)):
            self.outcome.add("DISTURBED", f"{what}: {changed[:4]}")
        if failed is None:
            return value
        if isinstance(failed, ValueError | RuntimeError) and raised_by_package(failed):
            raise Refused(str(failed))
        frames = traceback.extract_tb(failed.__traceback__)
        if "modified by an inplace operation" in str(failed) and not self.trains():
            self.outcome.refusals.append("cannot train in PyTorch either")
            return None
        place = f"{frames[-1].filename.rsplit('/', 2)[-1]}:{frames[-1].lineno}"
        kind = type(failed).__name__
        self.outcome.add("CRASHED", f"{what}: {kind} at {place}: {str(failed)[:300]}")
        return None

    def fishers(self) -> dict[str, bs.UnitFisher] | None:
        """The package's, or None where it has refused the model, or crashed."""
        try:
            return self.call("unit_fisher", self.measure)
        except Refused as refusal:
            if "class_axis=" in str(refusal) and "class_axis" not in self.case.options:
                self.case.options["class_axis"] = self.case.y.dim()
                self.outcome.refusals.append(str(refusal)[:160])
                return self.fishers()
            if self.justified(str(refusal)) is None:
                return None
            fit = set(layers_of(self.model)) - self.unfit - self.optional
            self.only = lambda name, module: name in fit
            try:
                return self.call("unit_fisher(layers=)", self.measure)
            except Refused as again:
                nothing = "has no layer that can be measured" in str(again) and not fit
                if not nothing and self.justified(str(again), layers=False):
                    self.outcome.add("UNJUSTIFIED", str(again))
                return None

    def measure(self) -> dict[str, bs.UnitFisher]:
        case, (x, y) = self.case, self.case.probe
        options = {**case.options, **case.extra}
        if "units" in options:  # those that every layer has
            options["units"] = {
                name: [u for u in options["units"] if u < self.expected[name].shape[0]]
                for name in self.oracle.slots
                if name in self.expected
            }
        with torch.no_grad() if case.without_gradients else nullcontext():
            return bs.unit_fisher(
                self.model, x, y, likelihood=case.likelihood, layers=self.only, **options
            )

    def justified(self, message: str, layers: bool = True) -> bool | None:
        """Whether a refusal concerns one layer that had to be refused; None for the whole model.

        A refusal without a reason that the grammar knows is a finding.
        """
        tolerance = torch.finfo(self.case.dtype).eps ** (1 / 3)
        if self.drawn.refused is not None or self.coupling > 0.1 * tolerance:
            self.outcome.refusals.append(f"{self.drawn.refused}: {message[:160]}")
            self.outcome.verdict = min(self.outcome.verdict, "refused", key=VERDICTS.index)
            return None
        if layers and any(f"'{n}'" in message for n in self.unfit | self.optional):
            self.outcome.refusals.append(message[:160])
            return True
        if self.excused(message):
            self.outcome.refusals.append(message[:160])
            self.outcome.verdict = min(self.outcome.verdict, "refused", key=VERDICTS.index)
            return None
        if layers:
            self.outcome.add("UNJUSTIFIED", message)
            return None
        return True

    def excused(self, message: str) -> bool:
        """Refusals that the contract asks for, though the oracle could go on."""
        called = any(s.positions for n, s in self.seen.items() if n not in self.unfit)
        maps = "look like the maps of convolution" in message
        return (
            maps
            or (not called and "does not call" in message)
            or ("no layer that can be measured" in message)
        )

    def trains(self) -> bool:
        """Whether PyTorch itself can go back through the model."""
        try:
            called(self.case.build().model.requires_grad_(True), self.case.x).sum().backward()
        except RuntimeError:
            return False
        return True

    # -- numbers -----------------------------------------------------------------------------------

    @property
    def single(self) -> Oracle:
        """The oracle in single precision, which tells what rounding does to a number."""
        if self._single is None:
            self._single = Oracle(self.case, torch.float32)
        return self._single

    @property
    def together(self) -> dict[str, Tensor]:
        """The expected matrices, from examples that run in batches."""
        if self._together is None:
            of = Oracle(self.case, self.case.dtype, self.size)
            self._together = of.fishers(self.labels)
        return self._together

    def compare(
        self,
        what: str,
        found: Tensor,
        expected: Tensor,
        single: Callable[[], Tensor],
        largest: float = 0.0,
        together: Callable[[], Tensor] | None = None,
    ) -> bool:
        """Compares two tensors unit by unit, on the first axis.

        Args:
            single: the expected tensor in single precision, called where it is needed.
            largest: a number that the rounding of these is a part of, squared.
            together: the expected tensor, where examples run as the package runs them.
        """
        self.outcome.checks += 1
        dtype = self.case.dtype
        if found.shape != expected.shape:
            self.outcome.add(
                "WRONG", f"{what}: shape {tuple(found.shape)} for {tuple(expected.shape)}"
            )
            return False
        if not expected.numel():
            return True
        found, expected = found.double().flatten(1), expected.double().flatten(1)
        error, size = (found - expected).abs().amax(1), expected.abs().amax(1)
        rounding = (1e2 * torch.finfo(dtype).eps) ** 2 * largest
        allowed = TOLERANCE[dtype] * size + FLOOR[dtype] * size.max() + rounding
        if bool((error <= allowed).all()):
            return True
        noise = (single().double().flatten(1) - expected).abs().amax(1)
        allowed = allowed + NOISE[dtype] * noise
        if together is not None and self.drawn.refused is None and self.sharing != "expand":
            # Equal maxima share their gradient, or one has it all: rounding decides which.
            self.has_kinks = True
            allowed = allowed + 2 * (together().double().flatten(1) - expected).abs().amax(1)
        bad = ~(error <= allowed)
        if not bad.any():
            return True
        u = int(torch.where(bad, error.nan_to_num(torch.inf) / size.clamp(min=1e-300), -1).argmax())
        i = int((found[u] - expected[u]).abs().nan_to_num(torch.inf).argmax())
        self.outcome.add(
            "WRONG",
            f"{what}: unit {u}, entry {i}: found {found[u, i]:.6e}, expected {expected[u, i]:.6e} "
            f"(error {float(error[u]):.1e} of {float(size[u]):.1e})",
        )
        return False

    def compare_fishers(self, fishers: dict[str, bs.UnitFisher]) -> None:
        """Compares matrices and incoming means, and judges what is missing."""
        for name in [*fishers, *(name for name in self.oracle.slots if name not in fishers)]:
            if name not in self.oracle.slots:
                self.outcome.refusals.append(f"unknown to the oracle: {name}")
                continue
            seen, inside = self.seen.get(name), name not in self.oracle.layers
            called = seen is not None and seen.positions > 0
            composed = inside or (name.endswith("out_proj") and not called)
            if composed and (name not in fishers or self.sharing == "expand"):
                continue
            if not called and not composed and name not in self.unfit:
                if name in fishers:
                    self.outcome.add("WRONG", f"'{name}' is measured, and never called")
                continue
            if not called and self.sharing == "expand":
                continue  # the oracle has no positions of it
            self.outcome.layers += 1
            if name not in fishers:
                if name not in self.optional | self.unfit:
                    said = [w for w in self.warnings if f"'{name}'" in w] or ["nothing was said"]
                    self.outcome.add("UNJUSTIFIED", f"'{name}' is left out: {said[0]}")
                continue
            self.outcome.measured += 1
            carried = ~fishers[name].imprecise  # others are said to be rounding
            self.compare(
                f"F of '{name}' ({type(self.oracle.slots[name].layer).__name__})",
                matrix(fishers[name])[carried],
                self.kept(self.expected[name])[carried],
                lambda name=name, carried=carried: self.kept(
                    self.single.fishers(self.labels, self.sharing)[name]
                )[carried],
                self.largest,
                lambda name=name, carried=carried: self.kept(self.together[name])[carried],
            )
            if called:
                self.compare_means(name, fishers[name].mean_p)

    def kept(self, of_units: Tensor) -> Tensor:
        """The rows of the units that are measured."""
        units = self.case.options.get("units")
        return of_units if units is None else of_units[[u for u in units if u < len(of_units)]]

    def compare_means(self, name: str, mean: Tensor) -> None:
        """Compares the mean incoming activations of a layer."""
        seen = self.seen[name]
        expected = self.kept(seen.incoming / seen.positions)
        mean = mean if mean.dim() == 2 else mean.expand(expected.shape)

        def single() -> Tensor:
            of_single = self.single.seen()[name]
            return self.kept(of_single.incoming / of_single.positions)

        eps = torch.finfo(self.case.dtype).eps
        self.compare(f"mean_p of '{name}'", mean, expected, single, seen.largest / (1e3 * eps))


def raised_by_package(error: Exception) -> bool:
    """Whether the error comes from a ``raise`` of the package, and not from PyTorch."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or "/biasshift/" not in last.tb_frame.f_code.co_filename:
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def matrix(fisher: bs.UnitFisher) -> Tensor:
    """The blocks, or where they would be too large the products with all unit vectors."""
    try:
        return fisher.matrix()
    except ValueError as error:
        if "memory_budget" not in str(error):
            raise
    mean = fisher.mean_q
    units, inputs = mean.shape
    columns = []
    for i in range(inputs + fisher.bias):
        v, v0 = mean.new_zeros(units, inputs), mean.new_zeros(units) if fisher.bias else None
        if i < inputs:
            v[:, i] = 1
        elif v0 is not None:
            v0[:] = 1
        w, w0 = fisher.matvec(v, v0)
        columns.append(w if w0 is None else torch.cat([w, w0[:, None]], 1))
    return torch.stack(columns, -1)


def judge_refusal(case: Case, outcome: Outcome) -> None:
    """Of a model that must be refused, and that not even PyTorch runs on one example."""
    assert case.built is not None
    x, y = case.probe
    try:
        bs.unit_fisher(case.built.model, x, y, likelihood=case.likelihood, **case.extra)
    except ValueError as refusal:
        outcome.verdict = "refused"
        outcome.refusals.append(str(refusal)[:160])
    else:
        outcome.add("WRONG", "batch statistics are measured")


def examine(seed: int) -> Outcome:
    """Returns the outcome of one seed."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = case(seed)
        try:
            examination = Examination(drawn)
        except Exception as error:  # the model itself, or the oracle
            outcome = Outcome(seed, "invalid", [f"{type(error).__name__}: {error}"[:300]])
            if drawn.built is not None and drawn.built.drawn.refused == "batch statistics":
                judge_refusal(drawn, outcome)
        else:
            outcome = examination.run()
    outcome.seconds = time.perf_counter() - start
    return outcome
