"""What is kept of a layer with shared weights in place of its blocks: vectors of every unit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.parts import (
    Moments,
    SharedMoments,
    Terms,
    Work,
    chunks,
)
from biasshift.theory import Scalars, Vectors


@dataclass(frozen=True)
class ExampleVectors:
    """The gradients of every example and label seed, by unit; a block sums their outer products.

    A row is an example and a seed. It is a `parts.PartWithRows`.
    """

    vectors: Float[Tensor, "units rows inputs"]  # Σ_t δ_t (a_t − reference)
    delta: Float[Tensor, "units rows"]  # Σ_t δ_t

    @property
    def terms(self) -> Terms:
        return "examples"

    @property
    def bytes(self) -> int:
        """The bytes that the part takes in memory."""
        return self.vectors.nbytes + self.delta.nbytes

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return self.vectors.numel() + self.delta.numel()

    @property
    def work(self) -> Work:
        rows = self.delta.shape[1]
        return Work(rows, rows, rows)

    @property
    def channels(self) -> int:
        return self.vectors.shape[2]

    def product(self, v: Vectors) -> Tensor:
        out = torch.empty_like(v)
        for u in self._chunks():
            own = self.vectors[u].to(v.dtype)
            out[u] = (own.mT @ (own @ v[u, :, None]))[:, :, 0]
        return out

    def select(self, units: Tensor) -> "ExampleVectors":
        return replace(self, vectors=self.vectors[units], delta=self.delta[units])

    def moved(self, d: Tensor) -> "ExampleVectors":
        step = self.delta[:, :, None] * (d if d.dim() == 1 else d[:, None, :])
        return replace(self, vectors=(self.vectors + step).to(self.vectors.dtype))

    def wide(self) -> "ExampleVectors":
        """Returns the part in float64."""
        return ExampleVectors(self.vectors.double(), self.delta.double())

    def rows(self) -> tuple[Float[Tensor, "units rows inputs"], Float[Tensor, "units rows"]]:
        """Returns ``Σ_t δ_t a_t`` and ``Σ_t δ_t`` of every example and label seed."""
        return self.vectors, self.delta

    def blocks(self) -> packed.Rows:
        units, _, inputs = self.vectors.shape
        rows = packed.zeros(units, inputs, self.vectors.device)
        packed.add_outer(rows, self.vectors)
        return rows

    def spread(self, share: Scalars) -> SharedMoments:
        w = share @ self.delta.double().square()
        first = torch.zeros(self.channels, dtype=torch.float64, device=share.device)
        second = first.new_zeros(self.channels, self.channels)
        for u in self._chunks():
            own = self.vectors[u].double() * share[u, None, None].sqrt()
            first += torch.einsum("uni,un->i", own, self.delta[u] * share[u, None].sqrt())
            second += own.flatten(0, 1).T @ own.flatten(0, 1)
        return w.sum(), first, second

    def moments(self) -> Moments:
        """Returns ``Σ δ²``, zeros, ``Σ δ v`` and ``Σ v²`` of every unit, in float64.

        The squared weights are those of whole examples, and come by `Sums.with_weight_squares`.
        """
        wide = self.delta.double()
        weight = wide.square().sum(1)
        first, squares = [], []
        # In float64 from what is held: V v = S v − o oᵀv, and where V is nearly singular the two
        # parts must agree to the last digit.
        for u in self._chunks():
            own = self.vectors[u].double()
            first.append((wide[u, None, :] @ own)[:, 0])
            squares.append(own.square().sum(1))
        return weight, torch.zeros_like(weight), torch.cat(first), torch.cat(squares)

    def _chunks(self) -> Iterator[slice]:
        """Slices of the units, whose vectors in float64 fit into memory."""
        units, rows, inputs = self.vectors.shape
        return chunks(units, rows * inputs)
