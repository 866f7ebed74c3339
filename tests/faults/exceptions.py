"""Exceptions inside of measurements cost no step of the user, and leave nothing behind."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import biasshift as bs
from tests.faults import interrupts
from tests.faults.tally import Tally

PARTS = ["around a step", "in a measurement"]
ERRORS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "memory": lambda: MemoryError(),
    "runtime": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] data. DefaultCPUAllocator"),
    "value": lambda: ValueError("Something does not fit."),
}
STEPS = 3


class Failing(TorchDispatchMode):
    """Raises an exception at the n-th operation of PyTorch, once."""

    def __init__(self, at: int, error: Exception | None) -> None:
        super().__init__()
        self.at, self.error, self.operations = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if self.error is not None and self.operations == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 3))


X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def trained(at: int, error: Exception | None, watched: bool = True) -> tuple[nn.Module, int, int]:
    """The model after a few steps, how many steps there were, and the operations of hooks.

    The exception comes inside of a hook around a step, never in the step itself.
    """
    model, steps = net(), 0
    failing = Failing(at, error)

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            nonlocal steps
            steps += 1
            with outside(failing):
                return super().step(closure)

    # The wrapper around `step` calls the hooks, inside of which the mode is on.
    optimizer = Counted(model.parameters(), lr=0.1, momentum=0.9)
    log = bs.instrument(model, optimizer, probe=(X, Y), every=1) if watched else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        with failing:
            optimizer.step()
    if log is not None:
        log.table()
        log.remove()
    return model, steps, failing.operations


@contextmanager
def outside(mode: Failing) -> Iterator[None]:
    """The user's own step is not part of the count, and does not fail."""
    error, mode.error, count = mode.error, None, mode.operations
    yield
    mode.error, mode.operations = error, count


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """``count`` exceptions, half in measurements around steps, half in those that a user calls."""
    made = []
    for name, tries in zip(PARTS, (_around_steps, _in_measurements), strict=True):
        if part in (None, name):
            tally = Tally(f"exception {name}")
            for loss in tries(-(-count // 2), random.Random(f"{seed} {name}")):
                if loss:
                    tally.lost.append(loss)
                else:
                    tally.unharmed += 1
            made.append(tally)
    return made


def _around_steps(count: int, draw: random.Random) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _, _ = trained(0, None, watched=False)
        _, _, operations = trained(0, None)
    for _ in range(count):
        kind, at = draw.choice(list(ERRORS)), draw.randint(1, operations)
        fault = _fault(at, ERRORS[kind](), plain)
        yield f"{kind} at {at} of {operations}: {fault}" if fault else ""


def _fault(at: int, error: Exception, plain: nn.Module) -> str:
    """What is not as without the exception."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, steps, _ = trained(at, error)
        except Exception as raised:
            return f"raised {raised!r}"
    told = [w for w in caught if "Training goes on" in str(w.message)]
    alike = all(
        torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if alike and steps == STEPS and not hooks and len(told) <= 1:
        return ""
    return f"{alike=} {steps=} {hooks=} {len(told)=}"


def _in_measurements(count: int, draw: random.Random) -> Iterator[str]:
    measurements = [m for m in interrupts.MEASUREMENTS if m not in interrupts.TRAINING]
    operations = {}
    for measure in measurements:
        with Failing(0, None) as counted:
            measure(*interrupts.made())
        operations[measure] = counted.operations
    for _ in range(count):
        measure, kind = draw.choice(measurements), draw.choice(list(ERRORS))
        at, error = draw.randint(1, operations[measure]), ERRORS[kind]()
        model, optimizer = interrupts.made()
        before, fault = interrupts.state(model, optimizer, False), ""
        try:
            with Failing(at, error):
                measure(model, optimizer)
        except Exception as raised:
            if raised is not error and error not in (raised.__cause__, raised.__context__):
                fault = f"raised {raised!r} "
        after = interrupts.state(model, optimizer, False)
        fault += ", ".join(name for name, value in before.items() if after[name] != value)
        yield f"{measure.__name__}, {kind} at {at}: {fault}" if fault else ""
