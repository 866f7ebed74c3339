"""Small data sets that are made, not downloaded, in the shapes of the real ones.

They serve to try a program, not a claim.
"""

import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from biasshift.data.dataset import DataSet, split
from biasshift.data.image_folders import ImageNet, imagenet

SPOTS = 4  # blobs in a row: coarse enough to be seen through the noise
NOISE = 0.5  # the share of an image that is not its class's pattern


def synthetic_mnist(train: int = 400, valid: int = 100, test: int = 100, seed: int = 0) -> DataSet:
    """Returns ten patterns of blobs in noise, as flat images of 28×28 pixels in [0, 1].

    Args:
        train: images to train; likewise `valid` and `test`. Classes differ by one image at most.
        seed: of the patterns, the noise and the order; the global random state is untouched.

    >>> synthetic_mnist().x_train.shape
    torch.Size([400, 784])
    """
    x, y = _blobs((1, 28, 28), 10, train + valid + test, seed)
    return split("synthetic-mnist", 10, x.flatten(1), y, [train, valid, test])


def synthetic_cifar(
    classes: int = 10, train: int = 400, valid: int = 100, test: int = 100, seed: int = 0
) -> DataSet:
    """Returns a pattern of colored blobs in noise for every class, as 3×32×32 bytes.

    Args:
        classes: how many patterns there are.
        train: images to train; likewise `valid` and `test`. Classes differ by one image at most.
        seed: of the patterns, the noise and the order; the global random state is untouched.

    >>> synthetic_cifar(classes=100).x_train.shape
    torch.Size([400, 3, 32, 32])
    """
    x, y = _blobs((3, 32, 32), classes, train + valid + test, seed)
    x = (255 * x).to(torch.uint8)
    return split(f"synthetic-cifar{classes}", classes, x, y, [train, valid, test])


def synthetic_imagenet(
    folder: str | Path,
    classes: int = 3,
    train: int = 8,
    valid: int = 4,
    side: int = 64,
    seed: int = 0,
) -> ImageNet:
    """Writes a folder of JPEG files in ImageNet's layout, and returns its images.

    Args:
        folder: appears complete or not at all.
        classes: how many patterns there are.
        train: images to train per class; likewise `valid`.
        side: height and width of the images in pixels.
        seed: of the patterns, the noise and the order; the global random state is untouched.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists already. Name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    x, y = _blobs((3, side, side), classes, classes * (train + valid), seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        _write(Path(part) / "whole", x, y, train)
        (Path(part) / "whole").rename(folder)
    return imagenet(folder)


def _blobs(
    shape: tuple[int, int, int], classes: int, images: int, seed: int
) -> tuple[Float[Tensor, "images channels height width"], Int[Tensor, " images"]]:
    """Images in [0, 1], the pattern of their class under noise, and the classes, of which all have
    as many up to one.
    """
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(classes, shape[0], SPOTS, SPOTS, generator=generator)
    patterns = torch.nn.functional.interpolate(spots, size=shape[1:], mode="bilinear")
    y = torch.randperm(images, generator=generator) % classes
    return (1 - NOISE) * patterns[y] + NOISE * torch.rand(images, *shape, generator=generator), y


def _write(folder: Path, x: Tensor, y: Tensor, train: int) -> None:
    from PIL import Image

    for label in range(int(y.max()) + 1):
        wnid = f"n{label:08d}"
        for number, image in enumerate(x[y == label]):
            path = folder / ("train" if number < train else "val") / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (255 * image).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path, quality=95)
