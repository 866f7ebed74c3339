"""Which images stand in which minibatch: a pure function of the seed and the epoch, the same on every process and device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


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
        raise ValueError(f"the seed and the epoch must not be negative, got seed {seed} and epoch {epoch}.")
    # Not seed + epoch: seed 0 in epoch 2 would then see what seed 1 sees in epoch 1.
    state = np.random.SeedSequence([seed, epoch, *more]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True)
class Batching:
    """How the images of an epoch are cut into minibatches, and each minibatch into the shares of several processes.

    Every process cuts the same order and takes its own contiguous share of each minibatch. The shares of a minibatch that
    `world` does not divide differ by one image, the first ones being the longer: weight the processes' means by their counts.

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
            raise ValueError(f"rank must be one of 0 … world − 1, got rank {self.rank} with world {self.world}.")
        if self.images < 1:
            raise ValueError("there are no examples to make batches of.")
        if len(self) == 0:
            raise ValueError(f"{self.images} examples make no whole batch of {self.batch_size}: take smaller batches or drop_last=False.")
        smallest = self.batch_size if self.drop_last else self.images - self.batch_size * (len(self) - 1)
        if smallest < self.world:
            raise ValueError(
                f"{self.images} examples in batches of {self.batch_size} leave a batch of {smallest}, in which some of the "
                f"{self.world} processes have no share: take another batch size, drop_last=True, or fewer processes."
            )

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return self.images // self.batch_size if self.drop_last else -(-self.images // self.batch_size)

    def share(self, batch: int) -> slice:
        """Where this process's share of minibatch `batch` (from 0) stands in the order of the epoch.

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
            raise ValueError(f"an epoch has {len(self)} batches; it cannot start behind {start} of them.")
        return (self.share(batch) for batch in range(start, len(self)))


def epoch_order(images: int, views: int, generator: torch.Generator) -> Int[Tensor, " images"]:
    """Every image once, in random order, each at a random one of its `views` places ``image + images * view``."""
    order = torch.randperm(images, generator=generator)
    return order + images * torch.randint(views, (images,), generator=generator) if views > 1 else order
