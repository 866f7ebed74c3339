"""Shuffled minibatches of tensors, and what every stream is made of: seeds, orders and shares.

The minibatches of an epoch are a pure function of the seed and the epoch's number: a resumed run
sees those of an uninterrupted one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from biasshift.data.augmentation import Augment

# -- orders and shares -----------------------------------------------------------------------------


def epoch_generator(seed: int, epoch: int, *more: int) -> torch.Generator:
    """Returns a CPU generator for one epoch; different arguments give unrelated numbers.

    Args:
        seed: of the run.
        epoch: the number of the epoch.
        more: further numbers that the randomness shall depend on, such as that of an image.

    Raises:
        ValueError: a number is negative.

    >>> draws = [torch.randperm(9, generator=epoch_generator(0, 1)) for _ in range(2)]
    >>> torch.equal(*draws)
    True
    """
    if min(seed, epoch, *more, 0) < 0:
        raise ValueError(
            f"'seed' and 'epoch' must not be negative, got seed {seed} and epoch {epoch}."
        )
    # Not seed + epoch: seed 0 in epoch 2 would then see what seed 1 sees in epoch 1.
    state = np.random.SeedSequence([seed, epoch, *more]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_order(images: int, views: int, generator: torch.Generator) -> Int[Tensor, " images"]:
    """Returns every image once, in random order, each at a random one of its `views` places.

    Image i in view v has the number ``i + images · v``. The order is drawn where the generator
    lives, so that a CPU generator gives the same order on every device.
    """
    device = generator.device
    order = torch.randperm(images, generator=generator, device=device)
    if views > 1:
        order = order + images * torch.randint(views, (images,), generator=generator, device=device)
    return order


@dataclass(frozen=True)
class Batching:
    """The cuts of an epoch into minibatches, and of each minibatch into shares of processes.

    Every process cuts the same order and takes its own contiguous share of each minibatch. The
    shares of a minibatch that `world` does not divide differ by one image; the first ones are
    longer. Weight the processes' means by their counts.

    Args:
        images: images in an epoch.
        batch_size: images in a minibatch, over all processes.
        rank: the number of this process, from 0.
        world: how many processes there are.
        drop_last: leave out a last minibatch that is shorter than the others.

    Raises:
        ValueError: there is no minibatch, or a process would have no share of one.

    >>> len(Batching(images=10, batch_size=4)), len(Batching(10, 4, drop_last=True))
    (3, 2)
    """

    images: int
    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def __post_init__(self):
        _refuse_batch_size(self.batch_size)
        if not 0 <= self.rank < self.world:
            raise ValueError(
                f"'rank' must be one of 0 … world − 1, got rank {self.rank} with world "
                f"{self.world}."
            )
        if self.images < 1:
            raise ValueError(f"Batches need at least one example, got {self.images} examples.")
        if len(self) == 0:
            raise ValueError(
                f"'batch_size' must be at most the {self.images} examples, got {self.batch_size}. "
                "Take smaller batches or drop_last=False."
            )
        last = self.images - self.batch_size * (len(self) - 1)
        smallest = self.batch_size if self.drop_last else last
        if smallest < self.world:
            raise ValueError(
                f"'batch_size' {self.batch_size} makes a batch of {smallest} of the {self.images} "
                f"examples, in which some of the {self.world} processes have no share. "
                "Take another batch size, drop_last=True, or fewer processes."
            )

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        whole, rest = divmod(self.images, self.batch_size)
        return whole if self.drop_last else whole + (rest > 0)

    def share(self, batch: int) -> slice:
        """Returns where this process's share of minibatch `batch` stands in the epoch's order.

        Args:
            batch: the number of the minibatch, from 0.

        >>> [Batching(images=10, batch_size=4, rank=rank, world=2).share(2) for rank in (0, 1)]
        [slice(8, 9, None), slice(9, 10, None)]
        """
        first = batch * self.batch_size
        size, longer = divmod(min(self.batch_size, self.images - first), self.world)
        begin = first + self.rank * size + min(self.rank, longer)
        return slice(begin, begin + size + (self.rank < longer))

    def shares(self, start: int = 0) -> Iterator[slice]:
        """Returns this process's shares from minibatch `start` (from 0) to the end of the epoch.

        Raises:
            ValueError: an epoch has fewer minibatches than are to be skipped.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"'start' must be from 0 to {len(self)}, the batches of an epoch, got {start}."
            )
        return map(self.share, range(start, len(self)))


def _refuse_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"'batch_size' must be at least 1, got {batch_size}.")


def _refuse_unpaired(x: Tensor, y: Tensor, views: int) -> None:
    if len(x) != len(y):
        raise ValueError(
            f"'x' and 'y' must have equal lengths, got {len(x)} examples and {len(y)} labels."
        )
    if views < 1 or len(x) % views:
        raise ValueError(f"'views' must divide the {len(x)} examples, got {views}.")


# -- minibatches -----------------------------------------------------------------------------------


@runtime_checkable
class Stream(Protocol):
    """The minibatches of a training run, epoch by epoch."""

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the minibatches (x, y) of epoch `number`, from 1, behind the first `start`.

        The minibatches that are skipped are not read.
        """
        ...


class BatchedStream:
    """What the streams of this package share: epochs that `Batching` cuts into minibatches.

    A subclass has a `seed`, `_batching`, and `_batches`, which yields an epoch's minibatches.
    """

    seed: int
    _batching: Batching
    _batches: Callable[[int, Iterator[slice]], Iterator[tuple[Tensor, Tensor]]]

    def __post_init__(self):
        epoch_generator(self.seed, 0)  # refuses a negative seed now, not when training begins
        len(self)  # refuses batches that cannot be, likewise

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return len(self._batching)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the minibatches (x, y) of epoch `number`, from 1, behind the first `start`.

        The minibatches that are skipped are not read: files stay closed, bytes unprepared. What the
        others hold does not depend on `start`.

        Raises:
            ValueError: epoch 0, or a `start` behind the end.
        """
        if number < 1:
            raise ValueError(f"'number' must be at least 1, the first epoch, got {number}.")
        return self._batches(number, self._batching.shares(start))


@dataclass(frozen=True, eq=False)
class TensorStream(BatchedStream):
    """Shuffled minibatches of a data set that lies in memory, on any device.

    An epoch depends on the seed and its number alone: on no other epoch, no device, and no number
    of processes. The order is drawn on the CPU and moved once per
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
        _refuse_unpaired(self.x, self.y, self.views)
        if self.augment is not None and self.x.dim() != 4:
            raise ValueError(
                "'augment' needs images (examples, channels, height, width), got 'x' of shape "
                f"{tuple(self.x.shape)}."
            )
        super().__post_init__()

    @property
    def _batching(self) -> Batching:
        images = len(self.x) // self.views
        return Batching(images, self.batch_size, self.rank, self.world, self.drop_last)

    def _batches(self, number: int, shares: Iterator[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = self._order(number)
        # One row of draws per place in the order: whoever has a share of the order has its rows of
        # the draws.
        draws = self.augment.draw(len(order), generator).to(self.x.device) if self.augment else None
        for share in shares:
            x = self.x.index_select(0, order[share])
            if self.augment is not None and draws is not None:
                x = self.augment.apply(x, draws[share])
            yield (self.prepare(x) if self.prepare else x), self.y.index_select(0, order[share])

    def _order(self, number: int) -> tuple[Tensor, torch.Generator]:
        generator = epoch_generator(self.seed, number)
        order = epoch_order(len(self.x) // self.views, self.views, generator)
        return order.to(self.x.device), generator


def epoch_of_all(
    streams: Sequence[TensorStream], number: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns the minibatches of an epoch of all streams, stacked, by one selection each.

    They are x (streams, batch, …) and y (streams, batch, …).

    Args:
        streams: of the same tensors and batches, without augmentation or preparation; they differ
            in their seeds alone.
        number: the epoch, from 1.
        start: how many minibatches are skipped.
    """
    x, y = streams[0].x, streams[0].y
    orders = torch.stack([stream._order(number)[0] for stream in streams])
    for share in streams[0]._batching.shares(start):
        rows = orders[:, share]
        x_rows, y_rows = (t.index_select(0, rows.flatten()) for t in (x, y))
        yield x_rows.unflatten(0, rows.shape), y_rows.unflatten(0, rows.shape)


def batches(
    x: Float[Tensor, "examples *inputs"],
    y: Int[Tensor, " examples"],
    batch_size: int,
    generator: torch.Generator,
    views: int = 1,
) -> Iterator[tuple[Float[Tensor, "batch *inputs"], Int[Tensor, " batch"]]]:
    """Returns one epoch of shuffled minibatches, for a training loop that needs no `TensorStream`.

    The last minibatch is shorter where `batch_size` does not divide the examples. No examples make
    one empty minibatch.

    Args:
        generator: the source of the shuffle. Each call draws one permutation from it, and one view
            per example where there are several.
        views: how often every example stands in `x`; the epoch has each of them once.

    Raises:
        ValueError: `batch_size` is not positive, `views` does not divide the examples, or `x` and
            `y` differ in length.

    >>> x, y = torch.arange(5.0), torch.arange(5)
    >>> [len(labels) for _, labels in batches(x, y, 2, torch.Generator().manual_seed(0))]
    [2, 2, 1]
    """
    _refuse_batch_size(batch_size)
    _refuse_unpaired(x, y, views)
    order = epoch_order(len(x) // views, views, generator).to(x.device)
    return ((x.index_select(0, i), y.index_select(0, i)) for i in order.split(batch_size))
