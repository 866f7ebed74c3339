"""Image files as tensors, decoded by worker processes. A file that is no image is one sentence, whoever met it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MAX_PIXELS = 100_000_000  # a few hundred bytes may unpack to more than the memory; ImageNet's largest has 19 million
WORKERS = min(4, os.cpu_count() or 1)
FORMATS = ("JPEG", "PNG")  # one of ImageNet's .JPEG files is a PNG


@dataclass(frozen=True, eq=False)
class Images:
    """Image files and the numbers of their classes."""

    paths: tuple[str, ...]
    y: Int[Tensor, " images"]

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self, count: int, seed: int = 0) -> "Images":
        """So many of them at random, each at most once, in their own order.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 < count <= len(self):
            raise ValueError(f"{count} images cannot be taken from {len(self)}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return Images(tuple(self.paths[i] for i in chosen.tolist()), self.y[chosen])


def read_photograph(path: str, side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """The image in red, green and blue, squeezed to `side` × `side` pixels; grey ones have three equal channels.

    Raises:
        RuntimeError: the file cannot be read, or is no whole JPEG or PNG image.
    """
    from PIL import Image

    if not os.path.isfile(path):  # a pipe would be waited for
        raise RuntimeError(f"'{path}' is no file, or has been deleted.")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of damaged notes about the camera; the size is looked at below
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise RuntimeError(f"'{path}' is an image of {image.width} × {image.height} pixels, more than is safe to unpack.")
                pixels = np.array(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    except RuntimeError:
        raise
    except Exception as error:  # which one depends on the byte that is wrong
        reason = getattr(error, "strerror", None) or "it is damaged, cut short, or something else"
        raise RuntimeError(f"'{path}' is no image that can be read ({reason}): delete the file or copy it anew.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _Files(Dataset):
    """What the worker processes do. Errors travel as text: raised there, they would arrive as a page of two processes' lines."""

    def __init__(self, paths: Sequence[str], side: int):
        self.paths, self.side = paths, side

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return read_photograph(self.paths[number], self.side)
        except RuntimeError as error:
            return str(error)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    wrong = [item for item in items if isinstance(item, str)]
    return wrong[0] if wrong else torch.stack([item for item in items if isinstance(item, Tensor)])


def photographs(
    images: Images, batches: list[list[int]], side: int, workers: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[UInt8[Tensor, "batch 3 {side} {side}"], Int[Tensor, " batch"]]]:
    """The batches (x, y) of the images with the given numbers, on `device`, in the given order.

    Args:
        workers: processes that decode ahead of whoever iterates; 0 decodes here.

    Raises:
        RuntimeError: a file is no image, by name; or a worker process was killed.
    """
    loader = DataLoader(
        _Files(images.paths, side),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator().manual_seed(0),  # the workers' seeds, which nobody uses; else the global generator is drawn from
    )
    try:
        for numbers, x in zip(batches, loader, strict=True):
            if isinstance(x, str):
                raise RuntimeError(x)
            yield x.to(device, non_blocking=True), images.y[torch.as_tensor(numbers)].to(device, non_blocking=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError("a process that loads images was killed, perhaps for want of memory: take fewer workers.") from error
