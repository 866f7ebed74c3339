"""Sums over the examples of a pass, uncentered: what decays between updates of the curvature."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.moments import sum_rounding
from biasshift.optim.update_rule import UpdateRule

# Elements of the errors times activations of shared weights that are formed at a time.
VECTORS = 2**22


@dataclass
class RunningSums:
    """Uncentered sums of one layer about a reference, float64: what `UpdateRule` reads.

    ``parts`` holds, by name, where the rule needs them:

    * ``weight``: Σ δ², (units,).
    * ``rounding``: What ``weight`` may be of rounding alone, (units,), where errors of the
      positions of an example add up; see `sum_rounding`. Missing where they have only one, and
      in states of older versions.
    * ``first``: Σ δ² (a − reference), (units, inputs).
    * ``second``: Σ δ² times the squares of a − reference, (units, inputs), or times their outer
      products, as the rows of `packed`.
    * ``samples`` in place of ``second``, of layers too large for outer products: a − reference and
      δ² of every example since the curvature was last updated.

    Under the center p sums are over positions and without weights: ``total`` in place of ``first``,
    Σ (a − reference), (groups, inputs), and ``second``, (groups, inputs) or (groups, inputs,
    inputs).
    """

    examples: float
    positions: float
    reference: Tensor  # (groups, inputs): products about the first batch's mean do not cancel
    parts: dict[str, list[Tensor]]
    left_out: float = 0.0  # of the examples, those without a label that counts

    @property
    def counted(self) -> float:
        """The examples that have a part in the loss."""
        return self.examples - self.left_out

    def add(self, other: "RunningSums", decay: float = 1.0) -> "RunningSums":
        """Decays these sums, adds others about the same reference, in place, and returns them.

        Examples that were kept do not decay: new ones take their place, and join them at
        ``decay=1``, as passes of one step do.
        """
        self.examples = decay * self.examples + other.examples
        self.left_out = decay * self.left_out + other.left_out
        self.positions = decay * self.positions + other.positions
        for rounding in self.parts.get("rounding", ()):
            if "rounding" not in other.parts:  # of examples of one position
                rounding.mul_(decay)
        for name, theirs in other.parts.items():
            mine = self.parts.setdefault(name, [torch.zeros_like(x) for x in theirs])
            if name == "samples":
                if decay == 1:
                    theirs = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
                self.parts[name] = theirs
            else:
                for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
                    mine[i] = x.double().mul_(decay).add_(y)  # one batch of rows may be float32
        return self

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
        return vars(self).copy()

    @classmethod
    def loaded(cls, saved: dict[str, Any], device: torch.device) -> "RunningSums":
        """Returns the sums that were `saved`, on the device.

        Tensors are copied, so that steps of one optimizer leave the state it was loaded from as it
        is.
        """
        parts = {
            name: [x.to(device, copy=True) for x in part] for name, part in saved["parts"].items()
        }
        reference = saved["reference"].to(device, copy=True)
        left_out = saved.get("left_out", 0.0)  # states of older versions have none
        return cls(saved["examples"], saved["positions"], reference, parts, left_out)

    def all_reduce(self) -> None:
        """Adds the sums of all processes, in place and on each of them.

        Their references must agree, and all processes must call it, layer by layer in one order.
        """
        counts = torch.tensor(
            [self.examples, self.positions, self.left_out],
            dtype=torch.float64,
            device=self.reference.device,
        )
        for x in [counts, *(x for part in self.parts.values() for x in part)]:
            dist.all_reduce(x)
        self.examples, self.positions, self.left_out = counts.tolist()


def batch_sums(
    a: Tensor,
    delta: Tensor | None,
    reference: Tensor,
    rule: UpdateRule,
    examples: float,
    kept: Tensor | None = None,
    share: Tensor | None = None,
    left_out: float = 0.0,
) -> RunningSums:
    """Returns the sums of one batch.

    A sample is an example where its positions belong together, else a position: then there is one
    position a sample.

    Args:
        a: (samples, positions, groups, inputs), the incoming activations.
        delta: (samples, positions, units), the errors; None where the rule does not read them.
        reference: (groups, inputs), about which products are formed.
        rule: Which sums are wanted.
        examples: How many examples the samples are of.
        kept: (samples, positions), bool, False where a position has no part in the loss: its errors
            are 0. None where all have.
        left_out: How many of the examples have no label that counts.
        share: The `rounding_share` of the errors, where these are multiples of what was computed.
    """
    shifted = a - reference.to(a.dtype)
    if kept is not None:
        shifted = shifted * kept[..., None, None]
    count = a.shape[0] * a.shape[1] if kept is None else int(kept.sum())
    parts = {"total": [shifted.sum((0, 1), dtype=torch.float64)]} if rule.center == "p" else {}
    if delta is not None:
        if rule.weight_sharing == "per_example" and delta.shape[1] > 1:
            parts["rounding"] = [sum_rounding(delta[None], share).double()]
        # (samples, positions, groups, units of a group)
        delta = delta.unflatten(2, (a.shape[2], -1))
        whole = delta.sum(1)
        parts["weight"] = [whole.double().square().sum(0).flatten()]
        if rule.center != "p":
            parts["first"] = [_weighted(delta * whole[:, None], shifted)]
    if delta is not None and rule.keeps_examples(a.shape[3]):
        rows = slice(None) if kept is None else kept[:, 0]
        parts["samples"] = [shifted[rows, 0, 0], delta[rows, 0, 0].square()]
    elif rule.scale != "none":
        second = _shared_second if rule.center == "p" else _unit_second
        parts["second"] = second(shifted, delta, rule)
    return RunningSums(examples, float(count), reference, parts, left_out)


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    """Σ weights ⊗ x over samples and positions, (units, inputs)."""
    weights, x = (y.flatten(0, 1).transpose(0, 1) for y in (weights, x))  # group by group
    return (weights.mT @ x).flatten(0, 1).double()


def _shared_second(shifted: Tensor, _: Tensor | None, rule: UpdateRule) -> list[Tensor]:
    by_group = shifted.flatten(0, 1).transpose(0, 1)
    if rule.scale == "diagonal":
        return [by_group.square().sum(1, dtype=torch.float64)]
    return [(by_group.mT @ by_group).double()]


def _unit_second(shifted: Tensor, delta: Tensor | None, rule: UpdateRule) -> list[Tensor]:
    assert delta is not None
    samples, positions, groups, inputs = shifted.shape
    units, diagonal = groups * delta.shape[-1], rule.scale == "diagonal"
    if positions == 1 and diagonal:
        return [_weighted(delta.square(), shifted.square())]
    if diagonal:
        rows = [shifted.new_zeros(units, inputs, dtype=torch.float64)]
    else:
        rows = packed.zeros(units, inputs, shifted.device)
    if positions == groups == 1:
        packed.add_weighted(rows, shifted[:, 0, 0], delta[:, 0, 0].square())
        return rows
    step = max(1, VECTORS // (units * inputs))
    for piece in (slice(i, i + step) for i in range(0, samples, step)):
        vectors = torch.einsum("ntgu,ntgi->guni", delta[piece], shifted[piece]).flatten(0, 1)
        if diagonal:
            rows[0] += vectors.square().sum(1)
        else:
            packed.add_outer(rows, vectors)
    return rows
