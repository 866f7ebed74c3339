"""Random crops and flips of whole minibatches, and the scaling of their pixels, on any device."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Real
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random crops of the images with a frame of zeros around them, and random horizontal flips.

    Drawing and applying are two steps. All numbers of an epoch are drawn at once on the CPU: every
    device and every process gives the same image the same crop.

    Args:
        pad: width of the frame in pixels; the crop has the size of the image. 0: no crops.
        flip: mirror every second image, on average.
    """

    pad: int = 4
    flip: bool = True

    def draw(self, images: int, generator: torch.Generator) -> Int[Tensor, "images 3"]:
        """Draws the crop and the flip of every image.

        Args:
            images: how many images there are.
            generator: a CPU generator, the only source of the numbers.

        Returns:
            For each image the row and the column of its crop in the frame, and 1 where it is
            mirrored, else 0. Rows and columns are uniform on 0 … ``2 · pad``.
        """
        return _draw(2 * self.pad + 1, self.flip, images, generator)

    def apply(
        self, x: Real[Tensor, "batch channels height width"], draws: Int[Tensor, "batch 3"]
    ) -> Real[Tensor, "batch channels height width"]:
        """Returns the images cropped and mirrored as drawn, in the same shape and dtype.

        Args:
            x: the images; they are not changed.
            draws: rows of what `draw` returned, on the device of `x`.

        >>> x = torch.arange(4).view(1, 1, 2, 2)
        >>> Augment(pad=1).apply(x, torch.tensor([[1, 1, 1]])).tolist()  # not moved, mirrored
        [[[[1, 0], [3, 2]]]]
        """
        framed = torch.nn.functional.pad(x, [self.pad] * 4)
        return _cut(framed, draws, x.shape[2], x.shape[3])


@dataclass(frozen=True)
class Crop:
    """Random square crops of square images, and random horizontal flips; used as `Augment` is.

    Args:
        side: height and width of the images in pixels.
        size: height and width of the crops.
        flip: mirror every second crop, on average.

    Raises:
        ValueError: the crop is larger than the image, or empty.
    """

    side: int = 256
    size: int = 224
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.size <= self.side:
            raise ValueError(
                f"'size' must be from 1 to {self.side} pixels, the side of the images, got "
                f"{self.size}."
            )

    def draw(self, images: int, generator: torch.Generator) -> Int[Tensor, "images 3"]:
        """Draws the row and the column of every image's crop, and whether it is mirrored.

        Rows and columns are uniform on 0 … ``side − size``. `generator` alone gives the numbers.
        """
        return _draw(self.side - self.size + 1, self.flip, images, generator)

    def center(self, images: int) -> Int[Tensor, "images 3"]:
        """Returns the draws that take the middle of each image and mirror none.

        Where ``side − size`` is odd, the crop lies half a pixel above and left of the center.
        """
        return torch.tensor([(self.side - self.size) // 2] * 2 + [0]).repeat(images, 1)

    def apply(
        self, x: Real[Tensor, "batch channels side side"], draws: Int[Tensor, "batch 3"]
    ) -> Real[Tensor, "batch channels size size"]:
        """Returns the crops as drawn, in the same dtype; `x` is not changed.

        >>> crop, x = Crop(side=3, size=1), torch.arange(9).view(1, 1, 3, 3)
        >>> crop.apply(x, crop.center(1)).item()
        4
        """
        return _cut(x, draws, self.size, self.size)


def _draw(
    places: int, flip: bool, images: int, generator: torch.Generator
) -> Int[Tensor, "{images} 3"]:
    """Row, column and mirroring; without flips the same rows and columns are drawn as with them."""
    corners = torch.randint(places, (images, 2), generator=generator)
    mirrored = torch.randint(2, (images, 1), generator=generator)
    return torch.cat([corners, mirrored if flip else torch.zeros_like(mirrored)], 1)


def _cut(
    x: Real[Tensor, "batch channels rows columns"],
    draws: Int[Tensor, "batch 3"],
    height: int,
    width: int,
) -> Real[Tensor, "batch channels {height} {width}"]:
    """From every image the rectangle at its own row and column, mirrored where it was drawn so."""
    rows = draws[:, 0, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = draws[:, 1, None] + torch.where(draws[:, 2, None] == 1, columns.flip(1), columns)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    cut = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


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
