"""Images made different in every epoch, a whole minibatch at a time, on its own device."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Real
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random crops of the images with a frame of zeros around them, and random horizontal flips.

    Drawing and applying are apart: all numbers of an epoch are drawn at once on the CPU, so that
    every device and every process gives the same image the same crop.

    Args:
        pad: width of the frame in pixels; the crop has the size of the image. 0: no crops.
        flip: mirror every second image, on average.
    """

    pad: int = 4
    flip: bool = True

    def draw(self, images: int, generator: torch.Generator) -> Int[Tensor, "images 3"]:
        """For each image the row and the column of its crop in the frame, and whether it is
        mirrored.
        """
        corners = torch.randint(2 * self.pad + 1, (images, 2), generator=generator)
        mirrored = torch.randint(2, (images, 1), generator=generator)
        return torch.cat([corners, mirrored if self.flip else torch.zeros_like(mirrored)], 1)

    def apply(
        self, x: Real[Tensor, "batch channels height width"], draws: Int[Tensor, "batch 3"]
    ) -> Real[Tensor, "batch channels height width"]:
        """The images as drawn, in the same dtype.

        >>> x = torch.arange(4).view(1, 1, 2, 2)
        >>> Augment(pad=1).apply(x, torch.tensor([[1, 1, 1]])).tolist()  # not moved, mirrored
        [[[[1, 0], [3, 2]]]]
        """
        return _cut(torch.nn.functional.pad(x, [self.pad] * 4), draws, x.shape[2], x.shape[3])


@dataclass(frozen=True)
class Crop:
    """Random crops of `size` × `size` pixels from images of `side` × `side`, and random horizontal
    flips; used as `Augment` is.

    Raises:
        ValueError: the crop is larger than the image.
    """

    side: int = 256
    size: int = 224
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.size <= self.side:
            raise ValueError(
                f"a crop must have from 1 to {self.side} pixels, the side of the images, got "
                f"{self.size}."
            )

    def draw(self, images: int, generator: torch.Generator) -> Int[Tensor, "images 3"]:
        """For each image the row and the column of its crop, and whether it is mirrored."""
        corners = torch.randint(self.side - self.size + 1, (images, 2), generator=generator)
        mirrored = torch.randint(2, (images, 1), generator=generator)
        return torch.cat([corners, mirrored if self.flip else torch.zeros_like(mirrored)], 1)

    def center(self, images: int) -> Int[Tensor, "images 3"]:
        """The draws that take the middle of each image as it is."""
        return torch.tensor([(self.side - self.size) // 2] * 2 + [0]).repeat(images, 1)

    def apply(
        self, x: Real[Tensor, "batch channels side side"], draws: Int[Tensor, "batch 3"]
    ) -> Real[Tensor, "batch channels size size"]:
        """The crops as drawn, in the same dtype."""
        return _cut(x, draws, self.size, self.size)


def _cut(
    x: Real[Tensor, "batch channels rows columns"],
    draws: Int[Tensor, "batch 3"],
    height: int,
    width: int,
) -> Real[Tensor, "batch channels {height} {width}"]:
    """From every image the rectangle at its own row and column, mirrored where the third number is
    1.
    """
    rows = draws[:, 0, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = draws[:, 1, None] + torch.where(draws[:, 2, None] == 1, columns.flip(1), columns)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return (
        x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


@dataclass(frozen=True, eq=False)
class Scale:
    """Pixels as numbers: ``x / divide − mean``, in float32.

    Args:
        divide: 255 puts bytes into [0, 1].
        mean: what is subtracted after dividing: one number per channel, shaped (channels, 1, 1), or
            per pixel. Nothing by default. Best on the images' device: elsewhere it is copied for
            every minibatch.

    >>> Scale()(torch.tensor([[0, 51, 255]], dtype=torch.uint8)).tolist()
    [[0.0, 0.2..., 1.0]]
    """

    divide: float = 255.0
    mean: Tensor | None = None

    def __call__(self, x: Real[Tensor, "batch *inputs"]) -> Real[Tensor, "batch *inputs"]:
        scaled = x.to(torch.float32) / self.divide
        return scaled if self.mean is None else scaled - self.mean.to(x.device)
