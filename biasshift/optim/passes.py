"""A forward pass until its errors are there: what is kept of it, without its graph."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from biasshift.measure import hooks
from biasshift.measure.outputs import classes_last
from biasshift.optim.running_sums import RunningSums

# Models that were pickled with the hooks of version 0.1 look for them here.
_deaf_ear, _hear_nothing = hooks._deaf_ear, hooks._hear_nothing


class UnfitLayer(ValueError):
    """A layer whose curvature cannot be formed of the passes as they are."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Layer '{name}' {why}")
        self.name, self.why = name, why


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
    owned: set[str] = field(default_factory=set)  # layers whose sums are no other pass's
    counted_in: object = None  # the period between two steps in which a backward pass reached it

    def copied(self) -> "Pass":
        """Returns a pass that others can be added to."""
        return replace(
            self, sums=dict(self.sums), without_gradients=set(self.without_gradients), owned=set()
        )

    def add(self, other: "Pass") -> None:
        """Adds what another pass has recorded, whose calls do not wait for errors."""
        self.examples += other.examples
        self.left_out += other.left_out
        self.bypassed = list(dict.fromkeys([*self.bypassed, *other.bypassed]))
        self.without_gradients |= other.without_gradients
        for name, new in other.sums.items():
            old = self.sums.get(name)
            # about another reference: from before a state was loaded
            if old is None or old.reference is not new.reference:
                self.sums[name] = new
                self.owned.discard(name)
                continue
            if name not in self.owned:  # a backward pass may come to the first pass once more
                old = old.own()
                self.owned.add(name)
            self.sums[name] = old.add(new)
