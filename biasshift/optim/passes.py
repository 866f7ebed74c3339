"""What is kept of a forward pass until its errors are there, and hooks that keep nothing alive."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biasshift.optim.running_sums import Sums


@dataclass(eq=False)
class Heard:
    """One call of a layer, and the error that came back. It holds no part of the graph, whose nodes hold it."""

    a: Tensor
    version: int
    shape: torch.Size
    delta: Tensor | None = None

    def keep(self, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """A hook before a node of the graph; a second loss on the same outputs adds to the first."""
        gradient = gradients[output]
        if gradient is not None:
            self.delta = gradient.detach() if self.delta is None else self.delta + gradient.detach()


@dataclass(eq=False)
class Pass:
    """One forward pass: sums already formed, or what is needed to form them once the errors are there."""

    examples: int
    sums: dict[str, Sums] = field(default_factory=dict)
    heard: dict[str, list[Heard]] = field(default_factory=dict)
    outputs: Heard | None = None


class Ear:
    """A hook that keeps no optimizer alive, and hears nothing in a copied or unpickled model."""

    def __init__(self, listener: object, method: str) -> None:
        self._listener, self._method = weakref.ref(listener), method

    def __call__(self, *args: object) -> Any:
        """What the listener answers: another output of the module, or None for its own."""
        listener = self._listener()
        return None if listener is None else getattr(listener, self._method)(*args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _deaf_ear, ()


def _deaf_ear() -> Callable:
    return _hear_nothing


def _hear_nothing(*args: object) -> None:
    pass
