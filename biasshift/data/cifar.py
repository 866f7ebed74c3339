"""CIFAR-10 and CIFAR-100: 60,000 color images of 32×32 pixels."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from biasshift.data.dataset import DataSet, obtain
from biasshift.data.safe_pickle import read_pickle

SHAPE = (3, 32, 32)  # of an image: red, green, blue, as the files have them
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


def cifar10(root: str | Path | None = None, download: bool = True, *, valid: int = 0) -> DataSet:
    """Returns CIFAR-10: 50,000 images to train and 10,000 to test, in 10 classes of equal size.

    Images are bytes (images, 3, 32, 32); ``Scale()`` puts them into [0, 1].

    Args:
        root: the folder that holds `cifar-10-batches-py/`, torchvision's layout. Default:
            `$BIASSHIFT_DATA`, else `./data`.
        download: fetch the files that are missing. They appear under their names only when all of
            them are complete.
        valid: the last so many training images validate instead. [open in the paper] None do by
            default: the paper's error rates are those of the test set, of networks that saw all
            50,000 (165,000 updates of 100 are then 330 epochs). The paper does not mention any
            choice made by them. Whoever tunes takes ``valid=5000``. The images' order is random:
            each class has about a tenth of the 5,000, not exactly.

    Raises:
        FileNotFoundError: files are missing, and downloading them was not allowed or failed.
        RuntimeError: a file is damaged, or is not what its name says. Nothing in it is executed.
        ValueError: `valid` leaves no image to train.
    """
    folder = obtain(
        "CIFAR-10",
        root,
        "cifar-10-batches-py",
        [*BATCHES, "test_batch"],
        download,
        extra=["batches.meta"],
    )
    return _read_set("cifar10", folder, BATCHES, "test_batch", "labels", 10, valid)


def cifar100(root: str | Path | None = None, download: bool = True, *, valid: int = 0) -> DataSet:
    """Returns CIFAR-100: as `cifar10`, in 100 classes (the fine labels), below `cifar-100-python/`.

    Arguments and errors are those of `cifar10`. The files are known by what they hold, not by a
    checksum: a copy with the images in another order is accepted.
    """
    folder = obtain(
        "CIFAR-100", root, "cifar-100-python", ["train", "test"], download, extra=["meta"]
    )
    return _read_set("cifar100", folder, ["train"], "test", "fine_labels", 100, valid)


def _read_set(
    name: str, folder: Path, train: Sequence[str], test: str, labels: str, classes: int, valid: int
) -> DataSet:
    if not 0 <= valid < TRAIN_IMAGES:
        raise ValueError(
            f"'valid' must be from 0 to {TRAIN_IMAGES - 1}, the training images less one, got "
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
    content = read_pickle(path)
    if not {"data", labels} <= content.keys():
        raise RuntimeError(
            f"'{path}' must have the entries 'data' and '{labels}'. It is damaged or a file of "
            "another data set: copy it anew."
        )
    pixels, numbers = content["data"], content[labels]
    expected = (images, math.prod(SHAPE))
    if not isinstance(pixels, np.ndarray) or pixels.shape != expected:
        shape = getattr(pixels, "shape", type(pixels).__name__)
        raise RuntimeError(
            f"'{path}' must hold pixels of shape {expected}, got {shape}. Copy it anew."
        )
    if not (
        isinstance(numbers, list)
        and len(numbers) == images
        and all(type(label) is int and 0 <= label < classes for label in numbers)
    ):
        raise RuntimeError(
            f"'{path}' must hold {images} labels from 0 to {classes - 1}. Copy it anew."
        )
    return torch.from_numpy(pixels.copy()).view(-1, *SHAPE), torch.tensor(numbers)


def _refuse_uneven(folder: Path, part: str, y: Int[Tensor, " images"], classes: int) -> None:
    """A damaged label, or a file under another's name, shows in the sizes of the classes."""
    counts, expected = y.bincount(minlength=classes), len(y) // classes
    if wrong := (counts != expected).nonzero().flatten().tolist():
        raise RuntimeError(
            f"'{folder}' must hold {expected} {part} images of every class, got "
            f"{int(counts[wrong[0]])} of class {wrong[0]}. A file is damaged or has another's "
            "name: copy the folder anew."
        )
