"""What is kept of a forward pass until its errors are there, and hooks that keep nothing alive."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule

# by which targets read off a gradient may leave [0, 1]: half precision gradients have two digits
SLACK = 0.05


@dataclass(eq=False)
class RecordedCall:
    """One call of a layer, and the error that came back. It holds no part of the graph, whose nodes
    hold it.
    """

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
    """One forward pass: sums already formed, or what is needed to form them once the errors are
    there.
    """

    examples: int
    sums: dict[str, RunningSums] = field(default_factory=dict)
    heard: dict[str, list[RecordedCall]] = field(default_factory=dict)
    outputs: RecordedCall | None = None


class WeakHook:
    """A hook that keeps no optimizer alive, and hears nothing in a copied or unpickled model."""

    def __init__(self, recorder: object, method: str) -> None:
        self._recorder, self._method = weakref.ref(recorder), method

    def __call__(self, *args: object) -> Any:
        """What the recorder answers: another output of the module, or None for its own."""
        recorder = self._recorder()
        return None if recorder is None else getattr(recorder, self._method)(*args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _deaf_ear, ()


def _deaf_ear() -> Callable:
    return _hear_nothing


def _hear_nothing(*args: object) -> None:
    pass


# -- what a mean loss has divided by -----------------------------------------------------------


class Divisor:
    """Reads off the first passes which of the means the user's loss is, and keeps to it."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self._divides_by: str | None = None

    def of(self, passes: list[Pass]) -> float:
        """The number that a mean loss divides by: the examples, or, as most losses of PyTorch do,
        all labels of all of them.

        Which of the two is read off the first step: the gradient of a negative log-likelihood by
        the outputs is prediction minus target, divided by that number, and a target lies between 0
        and 1. Nothing can be proven for ``gaussian``.
        """
        if self.rule.reduction == "sum":
            divisors = {"examples": 1.0}
        else:
            divisors = {
                "labels": sum(map(self._labels, passes)),
                "examples": float(sum(one.examples for one in passes)),
            }
        if self._divides_by is None and self.rule.likelihood == "gaussian":
            self._divides_by = "examples"
        if self._divides_by is None:
            self._divides_by = next(
                (unit for unit, divisor in divisors.items() if self._is_possible(passes, divisor)),
                None,
            )
        if self._divides_by is None:
            raise ValueError(
                f"The loss is not a {self.rule.reduction} of {self.rule.likelihood} negative "
                'log-likelihoods, as labels="empirical" '
                "needs: its gradient by the outputs leads to targets outside 0 … 1. Give "
                "reduction= as in the loss, divide the losses of "
                'accumulated batches by their number, do not scale it, or use labels="sampled".'
            )
        return divisors[self._divides_by]

    def _labels(self, one: Pass) -> float:
        assert one.outputs is not None
        outputs = one.outputs.a
        return float(
            outputs.numel() // outputs.shape[-1]
            if self.rule.likelihood == "categorical"
            else outputs.numel()
        )

    def _is_possible(self, passes: list[Pass], divisor: float) -> bool:
        for one in passes:
            assert one.outputs is not None
            outputs, gradient = one.outputs.a.double(), one.outputs.delta
            if gradient is None or one.outputs.a._version != one.outputs.version:
                continue
            p = outputs.softmax(-1) if self.rule.likelihood == "categorical" else outputs.sigmoid()
            targets = p - divisor * gradient.double()
            total = (
                targets.sum(-1) if self.rule.likelihood == "categorical" else targets.new_ones(())
            )
            if not (
                (targets > -SLACK).all()
                and (targets < 1 + SLACK).all()
                and ((total - 1).abs() < SLACK).all()
            ):
                return False
        return True
