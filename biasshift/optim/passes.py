"""A forward pass until its errors are there, hooks that keep nothing alive, and the loss's divisor.

`Pass` and `RecordedCall` are what is kept of a forward pass, without its graph. `WeakHook` calls a
`Recorder` as long as there is one. `Divisor` finds out what a mean loss has divided its errors by.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule

# How far targets read off a gradient may leave [0, 1]: half precision gradients have two digits.
SLACK = 0.05


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

    def keep(self, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Adds up the gradients of one output of a node: a hook before that node.

        A second loss on the same outputs adds to the first.
        """
        gradient = gradients[output]
        if gradient is not None:
            self.delta = gradient.detach() if self.delta is None else self.delta + gradient.detach()

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

    examples: int
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


# -- what a mean loss has divided by ---------------------------------------------------------------


class Divisor:
    """Finds out from the first passes what the user's mean loss divides by, and keeps to it.

    Only the errors of the user's own backward pass need it: they are those of a mean, and the
    curvature is made of the errors of single examples.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self._divides_by: str | None = None

    def of(self, passes: list[Pass]) -> float:
        """Returns the number that the loss divides by: 1 for a sum, else examples or labels.

        Most losses of PyTorch divide by all labels of all examples. Which of the two it is shows in
        the first step: the gradient of a negative log-likelihood by the outputs is prediction minus
        target, divided by that number, and a target lies between 0 and 1. Targets of ``gaussian``
        may be anything: there it is the examples.

        Raises:
            ValueError: If neither number leads to targets between 0 and 1.
        """
        outputs = [
            forward_pass.outputs for forward_pass in passes if forward_pass.outputs is not None
        ]
        if self.rule.reduction == "sum":
            divisors = {"examples": 1.0}
        else:
            divisors = {
                "labels": float(sum(self._labels(output.a).numel() for output in outputs)),
                "examples": float(sum(forward_pass.examples for forward_pass in passes)),
            }
        possible = (
            name
            for name, divisor in divisors.items()
            if all(self._is_possible(output, divisor) for output in outputs)
        )
        if self._divides_by is None:
            gaussian = self.rule.likelihood == "gaussian"
            self._divides_by = "examples" if gaussian else next(possible, None)
        if self._divides_by is None:
            raise ValueError(
                f"The loss is not a {self.rule.reduction} of {self.rule.likelihood} negative "
                'log-likelihoods, as labels="empirical" needs: its gradient by the outputs leads '
                "to targets outside 0 … 1. Give reduction= as in the loss, divide the losses of "
                "accumulated batches by their number, do not scale it, or use "
                'labels="sampled".'
            )
        return divisors[self._divides_by]

    def _labels(self, outputs: Tensor) -> Tensor:
        """One element per label."""
        return outputs[..., 0] if self.rule.likelihood == "categorical" else outputs

    def _is_possible(self, output: RecordedCall, divisor: float) -> bool:
        """Whether the targets are probabilities, with this divisor."""
        if output.delta is None or output.overwritten:
            return True
        categorical = self.rule.likelihood == "categorical"
        logits = output.a.double()
        p = logits.softmax(-1) if categorical else logits.sigmoid()
        targets = p - divisor * output.delta.double()
        in_range = ((targets > -SLACK) & (targets < 1 + SLACK)).all()
        return bool(in_range and (not categorical or ((targets.sum(-1) - 1).abs() < SLACK).all()))
