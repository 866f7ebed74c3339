"""Minibatches of image files: random crops to train on, center crops to test on, the mean image."""

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
from biasshift.data.stream import BatchedStream, Batching, epoch_generator, epoch_order

SIDE, CROP = 256, 224  # the paper's: images resized to 256 × 256, crops of 224 × 224
CHUNK = 64  # images at a time for the mean


@dataclass(frozen=True, eq=False)
class ImageStream(BatchedStream):
    """Shuffled minibatches of image files, decoded by worker processes.

    It is a `Stream` as `TensorStream` is one. Files are squeezed to `crop.side` pixels, prepared on
    the device, then cropped and flipped there: so a mean per pixel can be subtracted. The crops of
    an epoch are drawn beforehand from the seed and the epoch's number, one for each image. Which
    worker loads an image, and when, does not matter.

    Args:
        batch_size: over all processes.
        prepare: bytes (batch, 3, side, side) to numbers, before the crop, such as
            ``Scale(mean=mean_image(images))``.
        workers: processes that decode; 0 decodes here.
        rank: the number of this process; it loads its own contiguous share of each minibatch alone,
            see `Batching`.

    Raises:
        ValueError: there is no minibatch for every process.
        RuntimeError: while iterating: a file is not an image; the message names it.
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
        super().__post_init__()
        _refuse_workers(self.workers)

    @property
    def _batching(self) -> Batching:
        return Batching(len(self.images), self.batch_size, self.rank, self.world, self.drop_last)

    def _batches(self, number: int, shares: Iterator[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, number)
        order = epoch_order(len(self.images), 1, generator)
        draws = self.crop.draw(len(order), generator)
        batches = [order[share] for share in shares]
        numbers = [batch.tolist() for batch in batches]
        loaded = photographs(self.images, numbers, self.crop.side, self.workers, self.device)
        for batch, (x, y) in zip(batches, loaded, strict=True):
            yield self.crop.apply(self.prepare(x), draws[batch].to(x.device)), y


@dataclass(frozen=True, eq=False)
class CenterCrops:
    """Batches (x, y) of the middle of every image, in order, for testing.

    They may be iterated any number of times.

    Args:
        batch_size: images in a batch of this process.
        prepare: bytes to numbers, before the crop, as in `ImageStream`.
        workers: processes that decode; 0 decodes here.
        rank: the number of this process; of several, each has a contiguous share of the images,
            which may be empty.

    Raises:
        ValueError: a negative number of workers.
        RuntimeError: while iterating: a file is not an image; the message names it.
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
    """Returns the mean of every pixel over the images, squeezed to `side` × `side`, in [0, 1].

    ``mean_image(…).mean((1, 2), keepdim=True)`` is the mean per channel. All images are decoded,
    hours of one core for ImageNet: ``images.sample(100_000)`` gives each pixel to ± 0.001. The
    result is kept under the names, times and sizes of the files, see `cache_folder`.

    Args:
        workers: processes that decode; 0 decodes here.
        root: the folder of the data sets.
        on_batch: called with the number of images that are done, for a progress bar.

    Raises:
        RuntimeError: a file is not an image; the message names it.
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
    """What changes when a file changes. A missing one is reported when it is loaded."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _refuse_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"'workers' must be 0 or more, got {workers}.")
