"""Samples first: a layer keeps its samples while they are fewer numbers than its blocks.

Blocks are formed when they are read, straight in the dtype of the user. Inverse quantities are
solved by whatever is cheapest, and as exactly as by blocks (`solver.ExactSolver`). Once the samples
outnumber the blocks, these take their place for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import finished, packed
from biasshift.fisher.example_vectors import ExampleVectors
from biasshift.fisher.moments import Sums, WeightedSums
from biasshift.fisher.ranges import with_range
from biasshift.fisher.samples import ImplicitSums, Part, Samples
from biasshift.theory import Scalars, Vectors


@dataclass(frozen=True)
class HeldSums(ImplicitSums):
    """All sums of a layer, by its samples.

    Every part is a `Samples`, or where weights are shared every one is an `ExampleVectors`.
    """

    def with_weights(
        self, shifted: Float[Tensor, "samples inputs"], delta2: Float[Tensor, "samples units"]
    ) -> "HeldSums | WeightedSums":
        """Returns these sums and a batch in which a sample has one weight per unit.

        Args:
            shifted: ``a − reference``; it is kept, and must not be written into afterwards.
            delta2: the weights δ² ≥ 0 of every sample and unit.
        """
        part = Samples(shifted, delta2.T.clone(memory_format=torch.contiguous_format))
        return self.with_part(part.moments(), part).settled()

    def with_vectors(
        self, vectors: Float[Tensor, "units samples inputs"], delta: Float[Tensor, "samples units"]
    ) -> "HeldSums | WeightedSums":
        """Returns these sums and a batch of shared weights, whose units have rows of their own.

        Args:
            vectors: ``Σ_t δ_t (a_t − reference)``; it is kept, and must not be written into
                afterwards.
            delta: ``Σ_t δ_t``.
        """
        part = ExampleVectors(
            vectors.contiguous(), delta.T.clone(memory_format=torch.contiguous_format)
        )
        if not self._remain_few([*self.parts, part]):  # before any of it is added up
            return self.in_blocks().with_vectors(vectors, delta)
        return self.with_part(part.moments(), part)

    def settled(self) -> "HeldSums | WeightedSums":
        """Returns these sums, or the blocks where the samples are more numbers than they."""
        return self if self._remain_few(self.parts) else self.in_blocks()

    @cached_property
    def formed(self) -> WeightedSums:
        """The same sums with blocks, formed once and kept."""
        return self.in_blocks()

    def in_blocks(self) -> WeightedSums:
        """Returns the same sums with blocks, in the dtype of the samples, as those of a batch."""
        units, inputs = self.first.shape
        second = packed.zeros(units, inputs, self.first.device)
        for part in self._held:
            if isinstance(part, Samples):
                packed.add_weighted(second, part.a, part.delta2.T)
            else:
                packed.add_outer(second, part.vectors)
        own = {field.name: getattr(self, field.name) for field in fields(Sums)}
        return WeightedSums(**own, second=second)

    def about(self, reference: Tensor) -> "HeldSums":
        """Returns the sums about another reference; samples that move become float64 for it.

        In single precision the shift would be rounded in every sample.
        """
        if torch.equal(self.reference, reference):
            return self
        wide = tuple(part.wide() for part in self._held)
        return ImplicitSums.about(replace(self, parts=wide), reference)  # pyright: ignore[reportReturnType]

    def plus_all(self, other: "HeldSums") -> "HeldSums | WeightedSums":
        """Returns the sums over the samples of both, about the reference of the first."""
        other = other.about(self.reference)
        squares, parts = self.squares + other.squares, self.parts + other.parts
        return replace(self.plus(other), squares=squares, parts=parts).settled()

    def times(self, v: Vectors) -> Tensor:
        return super().times(v.double())

    def finish(self, out: Tensor, scale: Scalars, x: Vectors, y: Vectors) -> None:
        # never by what was read before: two readings agree in every bit
        samples = [part for part in self._held if isinstance(part, Samples)]
        if samples and finished.by_samples([part.a for part in samples], self.first.shape[1]):
            part = samples[0]
            finished.from_samples(out, part.a, part.delta2, scale, x, y)
        else:
            self.formed.finish(out, scale, x, y)

    def room(self, dtype: torch.dtype, size: int) -> Tensor:
        return Sums.room(self, dtype, size)

    @property
    def _held(self) -> list[Samples | ExampleVectors]:
        return [part for part in self.parts if isinstance(part, Samples | ExampleVectors)]

    def _remain_few(self, parts: Sequence[Part]) -> bool:
        """Whether parts are of one kind, and fewer numbers than the blocks."""
        units, inputs = self.first.shape
        held = [part for part in parts if isinstance(part, Samples | ExampleVectors)]
        numbers = sum(part.numbers for part in held)
        return len({part.terms for part in held}) < 2 and (
            8 * numbers <= packed.block_bytes(units, inputs)
        )


def are_few(samples: int, units: int, inputs: int) -> bool:
    """Returns whether samples are fewer numbers than the blocks of a layer.

    >>> are_few(1000, 128, 784), are_few(1000, 10, 16)
    (True, False)
    """
    return 8 * samples * (units + inputs) <= packed.block_bytes(units, inputs)


def are_few_vectors(rows: int, units: int, inputs: int) -> bool:
    """Returns whether the vectors of all units are fewer numbers than the blocks of a layer.

    >>> are_few_vectors(80, 128, 1152), are_few_vectors(80, 128, 100)
    (True, False)
    """
    return 8 * units * rows * (inputs + 1) <= packed.block_bytes(units, inputs)


def joined(
    one: WeightedSums | ImplicitSums, other: WeightedSums | ImplicitSums
) -> WeightedSums | ImplicitSums:
    """Returns the sums over the samples of both, about the reference of the first.

    Samples that are held join samples, and become blocks beside blocks. Others must be of one kind.
    """
    if isinstance(one, HeldSums) and isinstance(other, HeldSums):
        return one.plus_all(other)
    one, other = (x.in_blocks() if isinstance(x, HeldSums) else x for x in (one, other))
    return one + other  # pyright: ignore[reportOperatorIssue]  of equal storage


def summed(
    a: Tensor, delta2: Tensor, storage: str, memory_budget: int
) -> WeightedSums | ImplicitSums:
    """Returns the sums over samples that are all there, about their mean.

    Args:
        a: (samples, inputs), the incoming activations.
        delta2: (samples, units), the weights.
        storage: one of `STORAGES`.
        memory_budget: bytes that blocks may take.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    wide, units = a.detach().to(dtype), delta2.shape[1]
    reference = wide.mean(0)
    shifted, weights = with_range(wide - reference, delta2.detach().to(dtype))
    large = packed.block_bytes(units, a.shape[1]) > memory_budget
    if storage == "implicit" or (storage == "auto" and large):
        part = Samples(shifted, weights.T.clone(memory_format=torch.contiguous_format))
        sums = ImplicitSums.empty(units, reference, memory_budget)
        sums = sums.with_part(part.moments(), part)
    elif storage == "auto":
        sums = HeldSums.empty(units, reference, memory_budget).with_weights(shifted, weights)
    else:
        sums = WeightedSums.empty(units, reference).with_weights(shifted, weights)
    return sums.with_inputs(len(a), len(a), shifted.sum(0, dtype=torch.float64))
