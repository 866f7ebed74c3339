"""RunningSums over the examples of a pass, uncentered: what decays from one look at the curvature to the
next.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biasshift.fisher import packed
from biasshift.optim.update_rule import UpdateRule

VECTORS = (
    2**22
)  # elements of the errors times activations of shared weights that are formed at a time


@dataclass
class RunningSums:
    """Uncentered sums of one layer about a reference, float64: what `UpdateRule` reads, and nothing
    else.

    ``weight`` Σ δ² (units,); ``first`` Σ δ² (a − reference) (units, inputs); ``second`` the same of
    the squares (units, inputs) or of the outer products, as the rows of `triangle`. Under the
    center p there is in place of ``first`` the ``total`` Σ (a − reference) (groups, inputs), and
    ``second`` is Σ over positions, without weights, (groups, inputs) or (groups, inputs, inputs).
    Of layers too large for outer products there is no ``second`` but ``samples``: a − reference and
    δ² of every example, latest look.
    """

    examples: float
    positions: float
    reference: Tensor  # (groups, inputs): products about the first batch's mean do not cancel
    parts: dict[str, list[Tensor]]

    def add(self, other: "RunningSums", decay: float = 1.0) -> None:
        """Decays these sums and adds others about the same reference, in place."""
        self.examples = decay * self.examples + other.examples
        self.positions = decay * self.positions + other.positions
        for name, theirs in other.parts.items():
            mine = self.parts[name]
            if name == "samples":
                self.parts[name] = (
                    [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
                    if decay == 1
                    else theirs
                )
                continue
            for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
                mine[i] = x.double().mul_(decay).add_(y)  # one batch of rows may be float32

    def saved(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "positions": self.positions,
            "reference": self.reference,
            "parts": self.parts,
        }

    @classmethod
    def loaded(cls, saved: dict[str, Any], device: torch.device) -> "RunningSums":
        """With memory of their own."""
        parts = {
            name: [x.to(device, copy=True) for x in part] for name, part in saved["parts"].items()
        }
        return cls(
            saved["examples"], saved["positions"], saved["reference"].to(device, copy=True), parts
        )

    def all_reduce(self) -> None:
        """The sums over all processes, in place; their references must agree."""
        counts = torch.tensor(
            [self.examples, self.positions], dtype=torch.float64, device=self.reference.device
        )
        for x in [counts, *(x for part in self.parts.values() for x in part)]:
            dist.all_reduce(x)
        self.examples, self.positions = counts.tolist()


def batch_sums(
    a: Tensor, delta: Tensor | None, reference: Tensor, rule: UpdateRule, examples: int
) -> RunningSums:
    """The sums of one batch: a (samples, positions, groups, inputs), delta (samples, positions,
    units).

    A sample is an example where its positions belong together, else a position: then there is one
    position a sample.
    """
    shifted = a - reference.to(a.dtype)
    parts = {"total": [shifted.sum((0, 1), dtype=torch.float64)]} if rule.center == "p" else {}
    if delta is not None:
        delta = delta.unflatten(
            2, (a.shape[2], -1)
        )  # (samples, positions, groups, units of a group)
        whole = delta.sum(1)
        parts["weight"] = [whole.double().square().sum(0).flatten()]
        if rule.center != "p":
            parts["first"] = [_weighted(delta * whole[:, None], shifted)]
    if delta is not None and rule.keeps_examples(a.shape[3]):
        parts["samples"] = [shifted[:, 0, 0], delta[:, 0, 0].square()]
    elif rule.scale != "none":
        parts["second"] = (
            _shared_second(shifted, rule)
            if rule.center == "p"
            else _unit_second(shifted, delta, rule)
        )
    return RunningSums(float(examples), float(a.shape[0] * a.shape[1]), reference, parts)


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    """Σ weights ⊗ x over samples and positions, (units, inputs)."""
    by_group = [one.flatten(0, 1).transpose(0, 1) for one in (weights, x)]
    return (by_group[0].mT @ by_group[1]).flatten(0, 1).double()


def _shared_second(shifted: Tensor, rule: UpdateRule) -> list[Tensor]:
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
    rows = (
        [shifted.new_zeros(units, inputs, dtype=torch.float64)]
        if diagonal
        else packed.zeros(units, inputs, shifted.device)
    )
    if positions == groups == 1:
        packed.add_weighted(rows, shifted[:, 0, 0], delta[:, 0, 0].square())
        return rows
    step = max(1, VECTORS // (units * inputs))
    for n in (slice(i, i + step) for i in range(0, samples, step)):
        vectors = torch.einsum("ntgu,ntgi->guni", delta[n], shifted[n]).flatten(0, 1)
        if diagonal:
            rows[0] += vectors.square().sum(1)
        else:
            packed.add_outer(rows, vectors)
    return rows
