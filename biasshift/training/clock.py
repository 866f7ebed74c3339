"""How long the steps of a training run take, without the measurements along the way."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """The cost of training steps without that of measurements.

    These are CPU seconds on the CPU, which other programs on the machine do not change. On a GPU
    they are seconds between two events in its stream: the host runs ahead of it, and its own clock
    would tell how long the launches take.

    Args:
        device: Where training takes place.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.spent, self.undisturbed, self.steps = 0.0, 0, 0
        self._timed: list[tuple[Any, Any]] = []  # beginning and end of steps not yet added up

    @contextmanager
    def step(self, measured: bool) -> Iterator[None]:
        """Times one step, in a ``with`` block, without waiting for the device.

        Args:
            measured: The step holds measurements; it is taken to cost what the others do.
        """
        began = None if measured else self._now()
        yield
        self.steps += 1
        if not measured:
            self._timed.append((began, self._now()))

    def take(self) -> float:
        """Returns the seconds of all steps since the last call; waits for the device.

        They are the mean over all steps without measurements so far, times the steps since then.
        """
        self.spent += sum(self._seconds(began, ended) for began, ended in self._timed)
        self.undisturbed += len(self._timed)
        self._timed.clear()
        steps, self.steps = self.steps, 0
        return steps * self.spent / self.undisturbed if self.undisturbed else 0.0

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        if self.device.type != "cuda":
            return ended - began
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
