"""Minibatches as a pure function of the seed and the epoch: a run that goes on sees what an
uninterrupted one would have seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from biasshift.data.augmentation import Augment

__all__ = ["Augment", "Stream", "TensorStream"]


# -- which images stand in which minibatch -----------------------------------------------------


def epoch_generator(seed: int, epoch: int, *more: int) -> torch.Generator:
    """A CPU generator for one epoch; different seeds and epochs give unrelated numbers.

    Args:
        more: further numbers that the randomness shall depend on, such as that of an image.

    Raises:
        ValueError: a number is negative.

    >>> torch.equal(torch.randperm(9, generator=epoch_generator(0, 1)), torch.randperm(9, generator=epoch_generator(0, 1)))
    True
    """
    if min(seed, epoch, *more, 0) < 0:
        raise ValueError(
            f"the seed and the epoch must not be negative, got seed {seed} and epoch {epoch}."
        )
    # Not seed + epoch: seed 0 in epoch 2 would then see what seed 1 sees in epoch 1.
    state = np.random.SeedSequence([seed, epoch, *more]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True)
class Batching:
    """How the images of an epoch are cut into minibatches, and each minibatch into the shares of
    several processes.

    Every process cuts the same order and takes its own contiguous share of each minibatch. The
    shares of a minibatch that `world` does not divide differ by one image, the first ones being the
    longer: weight the processes' means by their counts.

    Args:
        batch_size: images in a minibatch, over all processes.
        rank: the number of this process, from 0.
        world: how many processes there are.
        drop_last: leave out a last minibatch that is shorter than the others.

    Raises:
        ValueError: there is no minibatch, or a process would have no share of one.

    >>> len(Batching(images=10, batch_size=4)), len(Batching(images=10, batch_size=4, drop_last=True))
    (3, 2)
    """

    images: int
    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if not 0 <= self.rank < self.world:
            raise ValueError(
                f"rank must be one of 0 … world − 1, got rank {self.rank} with world {self.world}."
            )
        if self.images < 1:
            raise ValueError("there are no examples to make batches of.")
        if len(self) == 0:
            raise ValueError(
                f"{self.images} examples make no whole batch of {self.batch_size}: take smaller "
                "batches or drop_last=False."
            )
        smallest = (
            self.batch_size if self.drop_last else self.images - self.batch_size * (len(self) - 1)
        )
        if smallest < self.world:
            raise ValueError(
                f"{self.images} examples in batches of {self.batch_size} leave a batch of "
                f"{smallest}, in which some of the "
                f"{self.world} processes have no share: take another batch size, drop_last=True, "
                "or fewer processes."
            )

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return (
            self.images // self.batch_size if self.drop_last else -(-self.images // self.batch_size)
        )

    def share(self, batch: int) -> slice:
        """Where this process's share of minibatch `batch` (from 0) stands in the order of the
        epoch.

        >>> [Batching(images=10, batch_size=4, rank=rank, world=2).share(2) for rank in (0, 1)]
        [slice(8, 9, None), slice(9, 10, None)]
        """
        first = batch * self.batch_size
        length = min(self.batch_size, self.images - first)
        size, longer = divmod(length, self.world)
        begin = first + self.rank * size + min(self.rank, longer)
        return slice(begin, begin + size + (self.rank < longer))

    def shares(self, start: int = 0) -> Iterator[slice]:
        """This process's shares from minibatch `start` (from 0) to the end of the epoch.

        Raises:
            ValueError: an epoch has fewer minibatches than are to be skipped.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"an epoch has {len(self)} batches; it cannot start behind {start} of them."
            )
        return (self.share(batch) for batch in range(start, len(self)))


def epoch_order(images: int, views: int, generator: torch.Generator) -> Int[Tensor, " images"]:
    """Every image once, in random order, each at a random one of its `views` places ``image +
    images * view``.
    """
    order = torch.randperm(images, generator=generator)
    return (
        order + images * torch.randint(views, (images,), generator=generator)
        if views > 1
        else order
    )


@runtime_checkable
class Stream(Protocol):
    """Where the minibatches of a training run come from."""

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches (x, y) of epoch `number`, from 1; the first `start` are skipped without
        being read.
        """
        ...


@dataclass(frozen=True, eq=False)
class TensorStream:
    """Shuffled minibatches of a data set that lies in memory, on any device.

    What an epoch holds depends on the seed and the epoch's number alone: on no other epoch, no
    device, and not on how many processes share it. The order is drawn on the CPU and moved once per
    epoch.

    Args:
        y: the labels, or anything else with one row per example.
        batch_size: over all processes; the last minibatch is shorter where it does not divide the
            examples.
        seed: of the order, the views and the augmentation.
        views: how often every example stands in `x`, all examples once, then all again; an epoch
            shows each once.
        augment: applied to the images as they lie in `x`: the pixels that come in are 0 there.
        prepare: applied after that: what turns bytes into numbers, such as ``Scale()``.
        rank: the number of this process; it sees its own contiguous share of each minibatch, see
            `Batching`.
        world: how many processes there are. Shares may differ by one example.
        drop_last: leave out a shorter last minibatch.

    Raises:
        ValueError: `x` and `y` differ in length, `views` does not divide it, or there is no
            minibatch for every process.

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
            raise ValueError(
                f"x has {len(self.x)} examples and y has {len(self.y)} labels; they must be as "
                "many."
            )
        if self.views < 1 or len(self.x) % self.views:
            raise ValueError(f"{len(self.x)} examples are no {self.views} views of as many images.")
        if self.augment is not None and self.x.dim() != 4:
            raise ValueError(
                "augment needs images (examples, channels, height, width); x has shape "
                f"{tuple(self.x.shape)}."
            )
        epoch_generator(self.seed, 0)  # refuses a negative seed now, not when training begins
        len(self)  # refuses batches that cannot be, likewise

    @property
    def _batching(self) -> Batching:
        return Batching(
            len(self.x) // self.views, self.batch_size, self.rank, self.world, self.drop_last
        )

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
        # One row of draws per place in the order: whoever has a share of the order has its rows of
        # the draws.
        draws = self.augment.draw(len(order), generator).to(self.x.device) if self.augment else None
        for share in shares:
            x = self.x.index_select(0, order[share])
            if self.augment is not None and draws is not None:
                x = self.augment.apply(x, draws[share])
            yield (self.prepare(x) if self.prepare else x), self.y.index_select(0, order[share])
