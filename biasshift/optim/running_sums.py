"""Sums over the examples of a pass, uncentered: what decays between updates of the curvature."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

from biasshift.optim.triangle import Products


@dataclass
class RunningSums:
    """Uncentered sums of one layer about a reference: what `UpdateRule` reads.

    They are in the dtype of the products, float32 for models of single or lower precision: what
    decays forgets its rounding, too. ``parts`` holds, by name, where the rule needs them:

    * ``weight``: Σ δ², (units,).
    * ``rounding``: What ``weight`` may be of rounding alone, (units,), where errors of the
      positions of an example add up; see `biasshift.fisher.moments.sum_rounding`. Missing where
      they have only one, and in states of older versions.
    * ``first``: Σ δ² (a − reference), (units, inputs).
    * ``second``: Σ δ² times the squares of a − reference, (units, inputs), or times their outer
      products, as the block rows of `triangle`.
    * ``samples`` in place of ``second``, of layers too large for outer products: a − reference and
      δ² of every example since the curvature was last updated.

    Under the center p sums are over positions and without weights: ``total`` in place of ``first``,
    Σ (a − reference), (groups, inputs), and ``second``, (groups, inputs) or (groups, inputs,
    inputs).

    ``waiting`` are outer products of a pass that become part of ``second`` when they are added to
    the sums of the passes before: matrices are not formed to be added.
    """

    examples: float
    positions: float
    reference: Tensor  # (groups, inputs): products about the first batch's mean do not cancel
    parts: dict[str, list[Tensor]]
    left_out: float = 0.0  # of the examples, those without a label that counts
    waiting: list[Products] = field(default_factory=list)

    @property
    def counted(self) -> float:
        """The examples that have a part in the loss."""
        return self.examples - self.left_out

    def add(self, other: "RunningSums", decay: float = 1.0) -> "RunningSums":
        """Decays these sums, adds others about the same reference, in place, and returns them.

        Examples that were kept do not decay: new ones take their place, and join them at
        ``decay=1``, as passes of one step do. The others are left as they are.
        """
        self.count(other, decay)
        self.settle()
        mine, theirs = [], []
        for name, part in self.parts.items():
            if name == "samples":
                pairs = zip(part, other.parts[name], strict=True)
                self.parts[name] = [torch.cat(pair) if decay == 1 else pair[1] for pair in pairs]
            elif name in other.parts:
                mine += part
                theirs += other.parts[name]
            elif decay != 1 and not (name == "second" and other.waiting):
                _foreach_mul_(part, decay)
        for name, part in other.parts.items():
            if name not in self.parts:
                self.parts[name] = [x.clone() for x in part]
        if mine and decay != 1:
            _foreach_mul_(mine, decay)
        if mine:
            _foreach_add_(mine, theirs)
        for i, products in enumerate(other.waiting):
            products.add_to(self.parts["second"], 1.0 if i else decay)
        return self

    def count(self, other: "RunningSums", decay: float) -> None:
        """Decays the counts and adds those of others."""
        self.examples = decay * self.examples + other.examples
        self.left_out = decay * self.left_out + other.left_out
        self.positions = decay * self.positions + other.positions

    def settle(self) -> "RunningSums":
        """Forms the products that are waiting, and returns the sums."""
        for products in self.waiting:
            decay = 1.0
            if "second" not in self.parts:
                self.parts["second"], decay = products.rows(), 0.0
            products.add_to(self.parts["second"], decay)
        self.waiting = []
        return self

    def own(self) -> "RunningSums":
        """Returns the same sums in memory of their own, with nothing waiting."""
        parts = {name: [x.clone() for x in part] for name, part in self.parts.items()}
        copy = RunningSums(
            self.examples, self.positions, self.reference, parts, self.left_out, [*self.waiting]
        )
        return copy.settle()

    @property
    def bias_inert(self) -> Tensor | None:
        """The units whose bias has no influence, (units,) bool; None where that is not known.

        Their errors cancel over the positions of every example, and ``weight`` is rounding.
        """
        if "rounding" not in self.parts:
            return None
        rounding, weight = self.parts["rounding"][0], self.parts["weight"][0]
        return (rounding > 0) & (weight <= rounding)

    def saved(self) -> dict[str, Any]:
        """Returns what `loaded` takes, for a state that is saved: every field by its name.

        Nothing is copied: the tensors are those of the sums, and change with them.
        """
        self.settle()
        return {name: value for name, value in vars(self).items() if name != "waiting"}

    @classmethod
    def loaded(
        cls, saved: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> "RunningSums":
        """Returns the sums that were `saved`, on the device and in the dtype of the products.

        Tensors are copied, so that steps of one optimizer leave the state it was loaded from as it
        is. Older versions have saved float64.
        """
        parts = {
            name: [x.to(device, dtype, copy=True) for x in part]
            for name, part in saved["parts"].items()
        }
        reference = saved["reference"].to(device, dtype, copy=True)
        left_out = saved.get("left_out", 0.0)  # states of older versions have none
        return cls(saved["examples"], saved["positions"], reference, parts, left_out)

    def all_reduce(self) -> None:
        """Adds the sums of all processes, in place and on each of them.

        Their references must agree, and all processes must call it, layer by layer in one order.
        """
        self.settle()
        counts = torch.tensor(
            [self.examples, self.positions, self.left_out],
            dtype=torch.float64,
            device=self.reference.device,
        )
        for x in [counts, *(x for part in self.parts.values() for x in part)]:
            dist.all_reduce(x)
        self.examples, self.positions, self.left_out = counts.tolist()
