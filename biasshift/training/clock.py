"""What training costs, apart from what measuring costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """The cost of training steps without that of measurements: CPU seconds on the CPU, which others on the machine do not change."""

    def __init__(self, device: torch.device):
        self.now = time.perf_counter if device.type == "cuda" else time.process_time
        self.spent, self.undisturbed, self.steps = 0.0, 0, 0

    @contextmanager
    def running(self, measured: bool) -> Iterator[None]:
        """Around one step; ``measured`` steps hold measurements and are taken to cost what the others do."""
        began = self.now()
        yield
        self.steps += 1
        if not measured:
            self.spent += self.now() - began
            self.undisturbed += 1

    def take(self) -> float:
        """Seconds of all steps since the last call."""
        steps, self.steps = self.steps, 0
        return steps * self.spent / self.undisturbed if self.undisturbed else 0.0
