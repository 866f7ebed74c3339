"""A forward pass until its errors are there, and hooks that keep nothing alive.

`Pass` and `RecordedCall` are what is kept of a forward pass, without its graph. `WeakHook` calls a
`Recorder` as long as there is one.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biasshift.measure.outputs import classes_last
from biasshift.optim.running_sums import RunningSums


@dataclass(eq=False)
class RecordedCall:
    """One call of a layer, and the error that came back.

    It holds no part of the graph: nodes of the graph hold it, and drop it with the graph. The
    model's outputs are recorded the same way, as ``a``, with their gradient as ``delta``.
    """

    a: Tensor
    version: int  # of ``a`` at the call
    shape: torch.Size  # of the net inputs
    delta: Tensor | None = None
    class_axis: int = -1  # of the outputs' gradient, which is kept with the classes last

    def keep(self, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Adds up the gradients of one output of a node: a hook before that node.

        A second loss on the same outputs adds to the first.
        """
        gradient = gradients[output]
        if gradient is not None:
            gradient = classes_last(gradient.detach(), self.class_axis)
            self.delta = gradient if self.delta is None else self.delta + gradient

    @property
    def overwritten(self) -> bool:
        """Whether ``a`` was changed in place after the call."""
        return self.a._version != self.version


@dataclass(eq=False)
class Pass:
    """One forward pass: its sums, or the calls that they are formed of when errors arrive.

    With sampled labels sums are formed as the pass ends. With the user's own errors the calls wait
    for the backward pass, and for the optimizer's step to say what the loss has divided by.
    """

    examples: float
    left_out: float = 0.0  # of the examples, those whose labels the loss does not count
    sums: dict[str, RunningSums] = field(default_factory=dict)
    calls: dict[str, list[RecordedCall]] = field(default_factory=dict)
    outputs: RecordedCall | None = None  # the model's, where labels are read off their gradient
    bypassed: list[str] = field(default_factory=list)  # layers whose errors cannot come back
    without_gradients: set[str] = field(default_factory=set)  # layers that ran in torch.no_grad


# -- hooks -----------------------------------------------------------------------------------------


class WeakHook:
    """A hook that does not keep its recorder alive, and does nothing in a copied model.

    A model may thus outlive its optimizer, and be copied or pickled with its hooks: what a copy or
    a pickle holds is a function that returns None.
    """

    def __init__(self, recorder: object, method: str) -> None:
        self._recorder, self._method = weakref.ref(recorder), method

    def __call__(self, *args: object) -> Any:
        """Returns what the recorder returns: another output of the module, or None for its own."""
        recorder = self._recorder()
        return None if recorder is None else getattr(recorder, self._method)(*args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _deaf_ear, ()


# Users' pickled models refer to the next two functions by module and name, also those of version
# 0.1: `_deaf_ear` stands in a model that was pickled with its hooks, and `_hear_nothing` in a copy
# of one. Neither may be renamed or moved.
def _deaf_ear() -> Callable:
    return _hear_nothing


def _hear_nothing(*args: object) -> None:
    pass
