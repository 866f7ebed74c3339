"""The random state of the process, put back after a measurement unless other threads have moved it.

PyTorch's generators are one for all threads. To put back a state that another thread has drawn from
would give that thread the same numbers twice. So the model is asked whether it draws numbers at
all, where there are other threads and a state has moved.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from biasshift.measure.examples import Inputs, call
from biasshift.restoration import Restoration

_blocks: list["RandomState"] = []  # of the thread whose turn it is, the outermost first


class RandomState:
    """The states of the generators of some devices, and of the CPU, as a measurement begins."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        cpu = torch.default_generator
        self._generators: list[tuple[Callable[[], Tensor], Callable[[Tensor], object]]] = [
            (cpu.get_state, cpu.set_state)
        ]
        for device in devices:
            if device.type == "cuda":
                write = partial(torch.cuda.set_rng_state, device=device)
                self._generators.append((partial(torch.cuda.get_rng_state, device), write))
        self._before = self._states()
        self._run: tuple[nn.Module, Inputs] | None = None  # the latest forward pass
        self._settled = False  # a block inside of this one has seen to its own numbers
        self._is_others = False  # what has moved the states

    def keep(self, restoration: Restoration) -> None:
        """Has the states put back at the end. It comes before what changes the model."""
        restoration.undo(self._restore)
        _blocks.append(self)

    def ask(self, restoration: Restoration) -> None:
        """Has the model asked at the end. It comes behind what changes the model."""
        restoration.undo(self._ask)

    def _states(self) -> list[Tensor]:
        return [read() for read, _ in self._generators]

    def _has_moved(self) -> bool:
        return not all(map(torch.equal, self._states(), self._before))

    def _ask(self) -> None:
        self._is_others = False
        # An exception may be the model's own, which would come again.
        if sys.exception() is None and threading.active_count() > 1:
            # What has not moved until now will not be moved by this thread.
            self._is_others = not self._has_moved() or not self._may_have_drawn()

    def _may_have_drawn(self) -> bool:
        return not self._settled if self._run is None else draws(*self._run)

    def _restore(self) -> None:
        self._run = None
        if not self._is_others:
            for (_, write), state in zip(self._generators, self._before, strict=True):
                write(state)
        while self in _blocks:
            _blocks.pop()
        if _blocks:
            _blocks[-1]._settled = True


def note_forward(model: nn.Module, x: Inputs) -> None:
    """Remembers what a model is run on, until the measurement ends."""
    if _blocks and threading.active_count() > 1:
        _blocks[-1]._run = model, x


def draws(model: nn.Module, x: Inputs) -> bool:
    """Returns whether a model draws from generators of the process, where a state has moved.

    Without other threads it has. A model that cannot be asked is taken to draw.
    """
    if threading.active_count() == 1:
        return True
    with _Draws() as mode, suppress(Exception):
        call(model, x.clone())
        return mode.seen
    return True


class _Draws(TorchDispatchMode):
    """Notices operations that draw numbers and are given no generator of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = func._schema.arguments
            given = {a.name: a.default_value for a in arguments if a.has_default_value()}
            given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
            never = given.get("dropout_p", given.get("p")) == 0 or given.get("train") is False
            self.seen |= given.get("generator") is None and not never
        return func(*args, **kwargs)
