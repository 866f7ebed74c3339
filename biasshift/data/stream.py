"""Minibatches as a pure function of the seed and the epoch: a run that goes on sees what an uninterrupted one would have seen."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor

from biasshift.data.augmentation import Augment
from biasshift.data.orders import Batching, epoch_generator, epoch_order

__all__ = ["Augment", "Stream", "TensorStream"]


@runtime_checkable
class Stream(Protocol):
    """Where the minibatches of a training run come from."""

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches (x, y) of epoch `number`, from 1; the first `start` are skipped without being read."""
        ...


@dataclass(frozen=True, eq=False)
class TensorStream:
    """Shuffled minibatches of a data set that lies in memory, on any device.

    What an epoch holds depends on the seed and the epoch's number alone: on no other epoch, no device, and not on how many
    processes share it. The order is drawn on the CPU and moved once per epoch.

    Args:
        y: the labels, or anything else with one row per example.
        batch_size: over all processes; the last minibatch is shorter where it does not divide the examples.
        seed: of the order, the views and the augmentation.
        views: how often every example stands in `x`, all examples once, then all again; an epoch shows each once.
        augment: applied to the images as they lie in `x`: the pixels that come in are 0 there.
        prepare: applied after that: what turns bytes into numbers, such as ``Scale()``.
        rank: the number of this process; it sees its own contiguous share of each minibatch, see `Batching`.
        world: how many processes there are. Shares may differ by one example.
        drop_last: leave out a shorter last minibatch.

    Raises:
        ValueError: `x` and `y` differ in length, `views` does not divide it, or there is no minibatch for every process.

    >>> import torch
    >>> stream = TensorStream(torch.zeros(5, 3), torch.arange(5), batch_size=2, seed=0)
    >>> [len(y) for x, y in stream.epoch(1)], [len(y) for x, y in stream.epoch(1, start=2)]
    ([2, 2, 1], [1])
    """

    x: Shaped[Tensor, "examples *inputs"]
    y: Shaped[Tensor, "examples *targets"]
    batch_size: int
    seed: int
    _: KW_ONLY
    views: int = 1
    augment: Augment | None = None
    prepare: Callable[[Tensor], Tensor] | None = None
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def __post_init__(self):
        if len(self.x) != len(self.y):
            raise ValueError(f"x has {len(self.x)} examples and y has {len(self.y)} labels; they must be as many.")
        if self.views < 1 or len(self.x) % self.views:
            raise ValueError(f"{len(self.x)} examples are no {self.views} views of as many images.")
        if self.augment is not None and self.x.dim() != 4:
            raise ValueError(f"augment needs images (examples, channels, height, width); x has shape {tuple(self.x.shape)}.")
        epoch_generator(self.seed, 0)  # refuses a negative seed now, not when training begins
        len(self)  # refuses batches that cannot be, likewise

    @property
    def _batching(self) -> Batching:
        return Batching(len(self.x) // self.views, self.batch_size, self.rank, self.world, self.drop_last)

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return len(self._batching)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches of epoch `number`, from 1, but for the first `start`.

        Raises:
            ValueError: epoch 0, or a `start` behind the end.
        """
        if number < 1:
            raise ValueError(f"epochs are numbered from 1, got {number}.")
        return self._batches(number, self._batching.shares(start))

    def _batches(self, number: int, shares: Iterator[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, number)
        order = epoch_order(len(self.x) // self.views, self.views, generator).to(self.x.device)
        # One row of draws per place in the order: whoever has a share of the order has its rows of the draws.
        draws = self.augment.draw(len(order), generator).to(self.x.device) if self.augment else None
        for share in shares:
            x = self.x.index_select(0, order[share])
            if self.augment is not None and draws is not None:
                x = self.augment.apply(x, draws[share])
            yield (self.prepare(x) if self.prepare else x), self.y.index_select(0, order[share])
