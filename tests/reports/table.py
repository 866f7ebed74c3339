"""One row a report: what the package gives, what the oracle gives, and how far they are apart."""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-9  # relative to the largest entry, in double precision

Measure = Callable[..., tuple[Any, Any]]


@dataclass(frozen=True)
class Row:
    """A situation that users met. ``measure`` builds it and returns (ours, the oracle's)."""

    subject: str
    situation: str
    measure: Callable[[], tuple[Any, Any]]
    tolerance: float

    @property
    def name(self) -> str:
        return f"{self.subject}: {self.situation}"

    def run(self) -> tuple[Any, Any]:
        """Ours and the oracle's, from a fixed seed; warnings are errors."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Too few (effective samples|different examples)")
            return self.measure()


ROWS: list[Row] = []


def report(
    subject: str, *variants: Any, tolerance: float = TOLERANCE
) -> Callable[[Measure], Measure]:
    """Adds a row for every variant, which the function gets; its name is the situation."""

    def add(function: Measure) -> Measure:
        situation = function.__name__.replace("_", " ")
        if not variants:
            ROWS.append(Row(subject, situation, function, tolerance))
        for variant in variants:
            label = ", ".join(map(str, variant)) if isinstance(variant, tuple) else str(variant)
            run = partial(function, variant)
            ROWS.append(Row(subject, f"{situation} ({label})", run, tolerance))
        return function

    return add


def refusal(action: Callable[[], Any]) -> str:
    """What the exception says."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def warned(action: Callable[[], Any]) -> str:
    """What the warnings say, each behind its kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return " | ".join(f"{w.category.__name__}: {w.message}" for w in caught)


def difference(ours: Any, oracle: Any) -> float:
    """The largest difference, relative to the oracle's largest entry; 0 or ∞ between texts."""
    if isinstance(oracle, re.Pattern):
        return 0.0 if isinstance(ours, str) and oracle.search(ours) else float("inf")
    if isinstance(oracle, dict):
        if ours.keys() != oracle.keys():
            return float("inf")
        return max(difference(ours[key], oracle[key]) for key in oracle)
    if isinstance(oracle, str | list | set):
        return 0.0 if ours == oracle else float("inf")
    found, expected = (torch.as_tensor(value).detach().double() for value in (ours, oracle))
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    kept = ~expected.isnan()
    if not kept.any():
        return 0.0
    found, expected = found[kept], expected[kept]
    size = float(expected.abs().max()) or 1.0
    return float(torch.where(found == expected, 0.0, found - expected).abs().max()) / size


def shown(value: Any) -> str:
    """A value in a few words: numbers as they are, tensors by their largest entry."""
    if isinstance(value, re.Pattern):
        return f"/{value.pattern}/"
    if isinstance(value, dict):
        return f"{len(value)} parts: {shown(next(iter(value.values())))}" if value else "none"
    if isinstance(value, Tensor) and value.dim():
        flat = value.detach().double().flatten()
        top = flat[flat.nan_to_num().abs().argmax()] if len(flat) else flat.sum()
        return f"{float(top):.8g} of {tuple(value.shape)}"
    if isinstance(value, bool | str | list | set):
        return str(value)
    return f"{float(value):.8g}"


def short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def lines(rows: list[Row]) -> Iterator[str]:
    """The table, line by line, as rows are run; the last line counts what is wrong."""
    wrong = 0
    yield f"{'report':100} {'ours':50} {'oracle':50} difference"
    for row in rows:
        try:
            ours, oracle = row.run()
            apart = difference(ours, oracle)
        except Exception as error:
            ours, oracle, apart = f"{type(error).__name__}: {error}", "", float("inf")
        wrong += apart > row.tolerance
        sign = "" if apart <= row.tolerance else "  WRONG"
        yield (
            f"{short(row.name, 100):100} {short(shown(ours), 50):50} "
            f"{short(shown(oracle), 50):50} {apart:.1e}{sign}"
        )
    yield f"{len(rows)} rows, {wrong} wrong"
