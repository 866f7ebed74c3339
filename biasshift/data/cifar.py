"""CIFAR-10 and CIFAR-100: 60,000 color images of 32×32 pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from biasshift.data.dataset import DataSet, data_root, obtain
from biasshift.data.safe_pickle import read_pickle

SHAPE = (3, 32, 32)  # of an image: red, green, blue, as the files have them
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


def cifar10(root: str | Path | None = None, download: bool = True, *, valid: int = 0) -> DataSet:
    """CIFAR-10: 50,000 images to train, 10,000 to test, in 10 classes of as many, as bytes (images,
    3, 32, 32).

    Args:
        root: the folder that holds `cifar-10-batches-py/`, torchvision's layout. Default:
            `$BIASSHIFT_DATA`, else `./data`.
        download: fetch the files that are missing. They appear under their names only when all of
            them are complete.
        valid: the last so many training images validate instead. [open in the paper] None do by
            default: the paper's error rates are those of the test set, of networks that saw all
            50,000 (165,000 updates of 100 are then 330 epochs), and it chose nothing by them that
            it says. Whoever tunes takes ``valid=5000``. The images' order is random: each class has
            about a tenth of the 5,000, not exactly.

    Raises:
        FileNotFoundError: the files are not there, and downloading them was not allowed or failed.
        RuntimeError: a file is damaged, or is not what its name says. Nothing in it is executed.
        ValueError: `valid` leaves no image to train.
    """
    folder = data_root(root) / "cifar-10-batches-py"
    files = [*BATCHES, "test_batch"]
    obtain(
        "CIFAR-10", folder, files, _fetch_cifar10, download, "cifar-10-batches-py", ["batches.meta"]
    )
    return _split("cifar10", folder, BATCHES, "test_batch", "labels", 10, valid)


def cifar100(root: str | Path | None = None, download: bool = True, *, valid: int = 0) -> DataSet:
    """CIFAR-100: as `cifar10`, in 100 classes (the fine labels), below `cifar-100-python/`.

    The files are known by what they hold, not by a checksum: a copy with the images in another
    order is accepted.
    """
    folder = data_root(root) / "cifar-100-python"
    obtain(
        "CIFAR-100",
        folder,
        ["train", "test"],
        _fetch_cifar100,
        download,
        "cifar-100-python",
        ["meta"],
    )
    return _split("cifar100", folder, ["train"], "test", "fine_labels", 100, valid)


def _split(
    name: str, folder: Path, train: Sequence[str], test: str, labels: str, classes: int, valid: int
) -> DataSet:
    if not 0 <= valid < TRAIN_IMAGES:
        raise ValueError(
            f"valid must be from 0 to {TRAIN_IMAGES - 1}, the training images less one, got "
            f"{valid}."
        )
    parts = [_read(folder / file, TRAIN_IMAGES // len(train), labels, classes) for file in train]
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    x_test, y_test = _read(folder / test, TEST_IMAGES, labels, classes)
    _refuse_uneven(folder, "training", y, classes)
    _refuse_uneven(folder, "test", y_test, classes)
    n = len(y) - valid
    return DataSet(name, classes, x[:n], y[:n], x[n:], y[n:], x_test, y_test)


def _read(
    path: Path, images: int, labels: str, classes: int
) -> tuple[UInt8[Tensor, "images 3 32 32"], Int[Tensor, " images"]]:
    """One file's images and labels, checked."""
    found = read_pickle(path)
    for key in ("data", labels):
        if key not in found:
            raise RuntimeError(
                f"'{path}' has no '{key}': it is another data set's file, or damaged; copy it anew."
            )
    pixels, numbers = found["data"], found[labels]
    expected = (images, SHAPE[0] * SHAPE[1] * SHAPE[2])
    if not isinstance(pixels, np.ndarray) or pixels.shape != expected:
        held = (
            f"shape {pixels.shape}"
            if isinstance(pixels, np.ndarray)
            else f"type {type(pixels).__name__}"
        )
        raise RuntimeError(
            f"'{path}' holds pixels of {held} where {expected} is expected: copy it anew."
        )
    if not _are_labels(numbers, images, classes):
        raise RuntimeError(
            f"'{path}' does not hold {images} labels from 0 to {classes - 1}: copy it anew."
        )
    return torch.from_numpy(pixels.copy()).view(-1, *SHAPE), torch.tensor(numbers)


def _are_labels(numbers: Any, images: int, classes: int) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == images
        and all(type(label) is int and 0 <= label < classes for label in numbers)
    )


def _refuse_uneven(folder: Path, part: str, y: Int[Tensor, " images"], classes: int) -> None:
    counts = y.bincount(minlength=classes)
    expected = len(y) // classes
    if wrong := (counts != expected).nonzero().flatten().tolist():
        raise RuntimeError(
            f"the {part} images in '{folder}' are {int(counts[wrong[0]])} of class {wrong[0]} "
            f"where every class has {expected}: "
            f"a file is damaged or stands there under another's name; copy the folder anew."
        )


def _fetch_cifar10(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10

    CIFAR10(str(folder), download=True)
    return folder / "cifar-10-batches-py"


def _fetch_cifar100(folder: Path) -> Path:
    from torchvision.datasets import CIFAR100

    CIFAR100(str(folder), download=True)
    return folder / "cifar-100-python"
