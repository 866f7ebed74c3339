"""Sums over samples, and every expectation of the theory read off them.

Sums are shifted by a reference mean (that of the first batch), because ``E(a aᵀ) − m mᵀ`` cancels
when means are large against the spread. Two sums with different references merge exactly: the shift
moves through first and zeroth moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed

AnySums = TypeVar("AnySums", bound="Sums")


@dataclass(frozen=True)
class Sums:
    """Moments of the incoming activations under p and under δ², up to first order, and the
    expectations read off them.

    ``reference`` and ``total`` are (inputs,) when all units see the same inputs, else (units,
    inputs). float64 throughout.
    """

    examples: int  # the number that E_p divides by
    positions: int  # samples in ``total``: examples × positions where weights are shared
    reference: Tensor
    total: Tensor  # Σ (a − reference)
    weight: Float[Tensor, " units"]  # Σ δ²
    weight_squares: Float[Tensor, " units"]  # Σ δ⁴
    first: Float[Tensor, "units inputs"]  # Σ δ² (a − reference)

    def with_inputs(self: AnySums, examples: int, positions: int, total: Tensor) -> AnySums:
        """These sums and incoming activations under p: ``total`` is Σ (a − reference) over all
        positions.
        """
        return replace(
            self,
            examples=self.examples + examples,
            positions=self.positions + positions,
            total=self.total + total,
        )

    def about(self: AnySums, reference: Tensor) -> AnySums:
        """The same sums about another reference."""
        d = self.reference - reference
        first = self.first + self.weight[:, None] * d.expand_as(self.first)
        return replace(
            self, reference=reference, total=self.total + self.positions * d, first=first
        )

    def plus(self: AnySums, other: "Sums") -> AnySums:
        """Sums over both sets of samples, when both are about the same reference."""
        return replace(
            self,
            examples=self.examples + other.examples,
            positions=self.positions + other.positions,
            total=self.total + other.total,
            weight=self.weight + other.weight,
            weight_squares=self.weight_squares + other.weight_squares,
            first=self.first + other.first,
        )

    # -- expectations, float64 ---------------------------------------------------------------------

    @property
    def mean_delta2(self) -> Tensor:
        return self.weight / self.examples

    @property
    def mean_p(self) -> Tensor:
        return self.reference + self.total / self.positions

    @property
    def offset_q(self) -> Tensor:
        """``m − reference``; NaN for a dead unit."""
        return self.first / self.weight[:, None]

    @property
    def mean_q(self) -> Tensor:
        return self.reference + self.offset_q

    @property
    def offset_pq(self) -> Tensor:
        """``m − μ``, in which the reference has dropped out."""
        return self.offset_q - self.total / self.positions

    @property
    def cov_p(self) -> Tensor:
        """``c (m − μ)``, which is 0 for a dead unit."""
        return (self.first - self.weight[:, None] * (self.total / self.positions)) / self.examples

    @property
    def effective_samples(self) -> Tensor:
        """``(Σ δ²)² / Σ δ⁴``, and 0 for a dead unit."""
        return torch.where(self.weight > 0, self.weight**2 / self.weight_squares, 0)

    @property
    def squares_q(self) -> Tensor:
        """``E_q (a − reference)²``, (units, inputs)."""
        raise NotImplementedError

    def times(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        """``V v`` for every unit."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightedSums(Sums):
    """What the unit Fisher matrices of a layer are made of, blocks included."""

    second: packed.Rows  # Σ δ² (a − reference)(a − reference)ᵀ

    @classmethod
    def empty(cls, units: int, reference: Float[Tensor, " inputs"]) -> "WeightedSums":
        """Sums over no samples. ``reference`` should be near the mean, and representable in the
        dtype of the samples.
        """
        wide, inputs = reference.double(), len(reference)
        zero = wide.new_zeros(units)
        second = packed.zeros(units, inputs, reference.device)
        return cls(
            0,
            0,
            wide,
            torch.zeros_like(wide),
            zero,
            zero.clone(),
            wide.new_zeros(units, inputs),
            second,
        )

    def with_weights(
        self, shifted: Float[Tensor, "samples inputs"], delta2: Float[Tensor, "samples units"]
    ) -> "WeightedSums":
        """These sums and a batch in which a sample has one weight per unit. Reuses (and spoils) the
        memory of ``self``.
        """
        packed.add_weighted(self.second, shifted, delta2)
        weight, squares = delta2.sum(0, dtype=torch.float64), delta2.double().square().sum(0)
        return self._weighted(weight, squares, delta2.T @ shifted)

    def with_vectors(
        self, vectors: Float[Tensor, "units samples inputs"], delta: Float[Tensor, "samples units"]
    ) -> "WeightedSums":
        """The same for shared weights, class by class: ``vectors`` are Σ_t δ_t (a_t − reference),
        ``delta`` Σ_t δ_t.

        The squared weights are those of whole examples, all classes together, and come by
        `with_weight_squares`.
        """
        packed.add_outer(self.second, vectors)
        weight = delta.double().square().sum(0)
        return self._weighted(
            weight, torch.zeros_like(weight), torch.einsum("nu,uni->ui", delta, vectors)
        )

    def with_weight_squares(self, delta2: Float[Tensor, "samples units"]) -> "WeightedSums":
        """What `with_vectors` could not know: the sum over examples of the squared ``Σ_y p_y (Σ_t
        δ_t)²``.
        """
        return replace(self, weight_squares=self.weight_squares + delta2.double().square().sum(0))

    def _weighted(self, weight: Tensor, squares: Tensor, first: Tensor) -> "WeightedSums":
        return replace(
            self,
            weight=self.weight + weight,
            weight_squares=self.weight_squares + squares,
            first=self.first + first.double(),
        )

    def moved(self, reference: Tensor) -> "WeightedSums":
        """The same sums about another reference; memory of its own."""
        d = self.reference - reference
        step = d.expand_as(self.first)
        second = packed.copied(self.second)
        packed.add_symmetric(second, step, self.first + 0.5 * self.weight[:, None] * step)
        return replace(self.about(reference), second=second)

    def __add__(self, other: "WeightedSums") -> "WeightedSums":
        other = other.moved(self.reference)
        for block, mine in zip(other.second, self.second, strict=True):
            block += mine
        return replace(self.plus(other), second=other.second)

    @staticmethod
    def stacked(parts: Sequence["WeightedSums"]) -> "WeightedSums":
        """One layer whose units see different inputs (groups): the units of every part, one part
        after the other.
        """
        first = parts[0]
        per_unit = [(p.reference.expand_as(p.first), p.total.expand_as(p.first)) for p in parts]
        return WeightedSums(
            first.examples,
            first.positions,
            torch.cat([reference for reference, _ in per_unit]),
            torch.cat([total for _, total in per_unit]),
            torch.cat([p.weight for p in parts]),
            torch.cat([p.weight_squares for p in parts]),
            torch.cat([p.first for p in parts]),
            packed.stack([p.second for p in parts]),
        )

    # -- expectations of second order, float64 -----------------------------------------------------

    @property
    def squares_q(self) -> Tensor:
        return (
            torch.cat([block.diagonal(dim1=1, dim2=2) for block in self.second], dim=1).double()
            / self.weight[:, None]
        )

    def second_q(self, units: slice | Tensor) -> Tensor:
        """``E_q (a − reference)(a − reference)ᵀ`` of some units."""
        return packed.dense(self.second, units).div_(self.weight[units][:, None, None])

    def var_q(self, units: slice | Tensor = slice(None)) -> Tensor:
        """``V``, the covariance of the incoming activations under q, of some units."""
        m = self.offset_q[units]
        return torch.baddbmm(self.second_q(units), m[:, :, None], m[:, None, :], alpha=-1)

    def times(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        return torch.bmm(self.var_q(), v.double()[:, :, None])[:, :, 0]
