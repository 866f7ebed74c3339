"""Little data sets that nobody has to download, in the shapes of the real ones: to try a program,
not a claim.
"""

import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from biasshift.data.dataset import DataSet
from biasshift.data.image_folders import ImageNet, imagenet

SPOTS = 4  # blobs in a row: coarse enough to be seen through the noise
NOISE = 0.5  # the share of an image that is not its class's pattern


def synthetic_mnist(train: int = 400, valid: int = 100, test: int = 100, seed: int = 0) -> DataSet:
    """Ten patterns of blobs in noise, flat images of 28×28 pixels in [0, 1].

    >>> synthetic_mnist().x_train.shape
    torch.Size([400, 784])
    """
    x, y = _blobs((1, 28, 28), 10, train + valid + test, seed)
    return _split("synthetic-mnist", 10, x.flatten(1), y, [train, valid, test])


def synthetic_cifar(
    classes: int = 10, train: int = 400, valid: int = 100, test: int = 100, seed: int = 0
) -> DataSet:
    """As many patterns of colored blobs in noise as there are classes, 3×32×32 bytes.

    >>> synthetic_cifar(classes=100).x_train.shape
    torch.Size([400, 3, 32, 32])
    """
    x, y = _blobs((3, 32, 32), classes, train + valid + test, seed)
    return _split(
        f"synthetic-cifar{classes}", classes, (255 * x).to(torch.uint8), y, [train, valid, test]
    )


def synthetic_imagenet(
    folder: str | Path,
    classes: int = 3,
    train: int = 8,
    valid: int = 4,
    side: int = 64,
    seed: int = 0,
) -> ImageNet:
    """A folder of JPEG files in ImageNet's layout, with `train` and `valid` images of `side` ×
    `side` pixels for each class.

    Args:
        folder: is made, whole or not at all.

    Raises:
        FileExistsError: there is something of that name.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists already: name a folder that is to be made.")
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


def _split(name: str, classes: int, x: Tensor, y: Tensor, sizes: list[int]) -> DataSet:
    (x_train, x_valid, x_test), (y_train, y_valid, y_test) = x.split(sizes), y.split(sizes)
    return DataSet(name, classes, x_train, y_train, x_valid, y_valid, x_test, y_test)


def _write(folder: Path, x: Tensor, y: Tensor, train: int) -> None:
    from PIL import Image

    for label in range(int(y.max()) + 1):
        for number, image in enumerate(x[y == label]):
            path = (
                folder
                / ("train" if number < train else "val")
                / f"n{label:08d}"
                / f"n{label:08d}_{number}.JPEG"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image).to(torch.uint8).permute(1, 2, 0).numpy()).save(
                path, quality=95
            )
