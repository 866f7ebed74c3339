"""Minibatches of image files: random crops to train on, center crops to test on, and the mean image
that both subtract.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from biasshift.data.augmentation import Crop, Scale
from biasshift.data.cache import Arrays, cache_folder, cached, content_key
from biasshift.data.image_folders import WORKERS, Images, photographs
from biasshift.data.stream import Batching, epoch_generator, epoch_order

SIDE, CROP = 256, 224  # the paper's: images resized to 256 × 256, crops of 224 × 224
CHUNK = 64  # images at a time for the mean


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Shuffled minibatches of image files, decoded by worker processes; a `Stream` as
    `TensorStream` is one.

    Files are squeezed to `crop.side` pixels, prepared on the device, then cropped and flipped
    there: so a mean per pixel can be subtracted. All crops of an epoch are drawn beforehand, one
    for each image from the seed and the epoch: which worker loads it, and when, does not matter.

    Args:
        batch_size: over all processes.
        prepare: bytes (batch, 3, side, side) to numbers, before the crop, such as
            ``Scale(mean=mean_image(images))``.
        workers: processes that decode; 0 decodes here.
        rank: the number of this process; it loads its own contiguous share of each minibatch alone,
            see `Batching`.

    Raises:
        ValueError: there is no minibatch for every process.
        RuntimeError: while iterating: a file is no image, by name.
    """

    images: Images
    batch_size: int
    seed: int
    _: KW_ONLY
    prepare: Callable[[Tensor], Tensor] = field(default_factory=Scale)
    crop: Crop = field(default_factory=lambda: Crop(SIDE, CROP))
    workers: int = WORKERS
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def __post_init__(self):
        epoch_generator(self.seed, 0)  # refuses a negative seed now, not when training begins
        len(self)  # refuses batches that cannot be, likewise
        _refuse_workers(self.workers)

    @property
    def _batching(self) -> Batching:
        return Batching(len(self.images), self.batch_size, self.rank, self.world, self.drop_last)

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return len(self._batching)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches of epoch `number`, from 1, but for the first `start`, whose files are not
        opened.

        Raises:
            ValueError: epoch 0, or a `start` behind the end.
        """
        if number < 1:
            raise ValueError(f"epochs are numbered from 1, got {number}.")
        return self._batches(number, list(self._batching.shares(start)))

    def _batches(self, number: int, shares: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, number)
        order = epoch_order(len(self.images), 1, generator)
        draws = self.crop.draw(len(order), generator)
        chosen = [order[share] for share in shares]
        loaded = photographs(
            self.images,
            [part.tolist() for part in chosen],
            self.crop.side,
            self.workers,
            self.device,
        )
        for part, (x, y) in zip(chosen, loaded, strict=True):
            yield self.crop.apply(self.prepare(x), draws[part].to(x.device)), y


@dataclass(frozen=True, eq=False)
class CenterCrops:
    """Batches (x, y) of the middle of every image, in order, for testing; may be iterated any
    number of times.

    Args:
        rank: the number of this process; of several, each has a contiguous share of the images,
            which may be empty.
    """

    images: Images
    batch_size: int = 100
    _: KW_ONLY
    prepare: Callable[[Tensor], Tensor] = field(default_factory=Scale)
    crop: Crop = field(default_factory=lambda: Crop(SIDE, CROP))
    workers: int = WORKERS
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        _refuse_workers(self.workers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.arange(len(self.images)).tensor_split(self.world)[self.rank]
        batches = [part.tolist() for part in mine.split(self.batch_size)] if len(mine) else []
        for x, y in photographs(self.images, batches, self.crop.side, self.workers, self.device):
            yield self.crop.apply(self.prepare(x), self.crop.center(len(x)).to(x.device)), y


def mean_image(
    images: Images,
    side: int = SIDE,
    workers: int = WORKERS,
    root: str | Path | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Float32[Tensor, "3 {side} {side}"]:
    """The mean of every pixel over the images, squeezed to `side` × `side`, in [0, 1]; ``.mean((1,
    2), keepdim=True)`` is that per channel.

    All images are decoded, hours of one core for ImageNet: ``images.sample(100_000)`` gives each
    pixel to ± 0.001. The result is kept under the names, times and sizes of the files, see
    `cache_folder`.

    Args:
        root: the folder of the data sets.
        on_batch: called with the number of images that are done, for a progress bar.

    Raises:
        RuntimeError: a file is no image, by name.
    """

    def compute() -> Arrays:
        sums, numbers = torch.zeros(3, side, side, dtype=torch.int64), list(range(len(images)))
        batches = [numbers[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        done = 0
        for x, _ in photographs(images, batches, side, workers):
            sums += x.sum(0, dtype=torch.int64)
            done += len(x)
            on_batch(done)
        return {"mean": sums.numpy() / (255.0 * len(images))}

    key = content_key(images.paths, np.array([_state(path) for path in images.paths]), side)
    mean = cached("mean", key, {"mean": (3, side, side)}, compute, cache_folder(root))["mean"]
    return torch.from_numpy(mean).to(torch.float32)


def _state(path: str) -> tuple[int, int]:
    """What changes when a file changes. One that is gone is found when it is loaded."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _refuse_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}.")
