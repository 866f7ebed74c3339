"""Handwritten digits: scikit-learn's 1,797 small ones, shifted copies of them, and MNIST."""

import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from biasshift.data.augmentation import Scale
from biasshift.data.dataset import DataSet, data_root, obtain, split
from biasshift.data.ordinary_files import read_ordinary, unpacked_gzip

DIGITS_TRAIN, DIGITS_VALID = 1_437, 180  # of 1,797 images; the remaining 180 test
# Each file of MNIST/raw and its shape. The original files, as torchvision unpacks them, or with
# .gz as they are published.
MNIST_FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
MNIST_TRAIN = 50_000  # [open in the paper] the last 10,000 of the 60,000 training images validate


def digits(seed: int = 0) -> DataSet:
    """Returns scikit-learn's digits: 1,437 to train, 180 to validate and 180 to test.

    Each is a flat image of 8×8 pixels. Pixels are divided by 16, so that they lie in [0, 1]; they
    are not centered (mean .305, standard deviation .376). The data comes with scikit-learn: nothing
    is downloaded.

    Args:
        seed: of the split alone. The same seed gives the same split on every machine.

    >>> digits().x_train.shape
    torch.Size([1437, 64])
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    sizes = [DIGITS_TRAIN, DIGITS_VALID, len(y) - DIGITS_TRAIN - DIGITS_VALID]
    return split("digits", 10, x, y, sizes)


def shifted(data: DataSet, side: int) -> DataSet:
    """Returns the data set with every training image at nine places: ``views = 9``.

    The places differ by up to one pixel in each direction; the first view is the image itself. An
    epoch shows every image once, at a random one of its places. All places of all images are the
    whole population that the network is trained on. Expectations under the data over ``x_train``
    are exact then, and rest on nine times the samples.

    Args:
        data: flat images; those that validate and test stay as they are.
        side: height and width of the square images. Pixels that come in are 0.

    >>> shifted(digits(), side=8).x_train.shape
    torch.Size([12933, 64])
    """
    padded = torch.nn.functional.pad(data.x_train.view(-1, side, side), (1, 1, 1, 1))
    corners = [(1, 1)] + [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    x = torch.cat([padded[:, i : i + side, j : j + side].flatten(1) for i, j in corners])
    return replace(data, x_train=x, y_train=data.y_train.repeat(len(corners)), views=len(corners))


def mnist(
    root: str | Path | None = None, download: bool = True, *, as_bytes: bool = False
) -> DataSet:
    """Returns MNIST as flat images: 50,000 to train, 10,000 to validate and 10,000 to test.

    The last 10,000 of the 60,000 training images validate. Pixels are divided by 255, so that they
    lie in [0, 1]; they are not centered (mean .131, standard deviation .308). The paper leaves both
    open.

    Args:
        root: the folder that holds `MNIST/raw/`, torchvision's layout, with the four files unpacked
            or as `.gz`. Default: `$BIASSHIFT_DATA`, else `./data`.
        download: fetch the files that are missing. They appear under their names only when all of
            them are complete.
        as_bytes: leave the pixels as stored, in uint8, a quarter of the memory; ``Scale()`` makes
            the same numbers of them.

    Raises:
        FileNotFoundError: files are missing, and downloading them was not allowed or failed.
        RuntimeError: a file is damaged, or is not what its name says.
    """
    raw = data_root(root) / "MNIST/raw"
    packed = {name for name in MNIST_FILES if not (raw / name).exists()}
    files = [
        f"{name}.gz" if name in packed and (raw / f"{name}.gz").exists() else name
        for name in MNIST_FILES
    ]
    obtain("MNIST", root, "MNIST/raw", files, download)
    shapes = MNIST_FILES.values()
    x, y, x_test, y_test = (
        _read_idx(raw / file, shape) for file, shape in zip(files, shapes, strict=True)
    )
    x, x_test = x.flatten(1), x_test.flatten(1)
    if not as_bytes:
        x, x_test = Scale()(x), Scale()(x_test)
    n = MNIST_TRAIN
    return DataSet("mnist", 10, x[:n], y[:n], x[n:], y[n:], x_test, y_test)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The images (uint8) or labels (int64) of one file, checked."""
    remedy = (
        "It is damaged or a file of another data set: delete it and run again with a network, or "
        "copy it anew"
    )
    header = 4 * (1 + len(shape))
    size = header + math.prod(shape)
    try:
        # Random bytes grow a little when they are packed.
        content = read_ordinary(path, size + size // 100 + 1000)
        if path.suffix == ".gz":
            content = unpacked_gzip(content, size + 1)
    except zlib.error as error:
        raise RuntimeError(f"'{path}' is not a complete gzip file. {remedy}.") from error
    except OSError as error:
        raise RuntimeError(f"'{path}' cannot be read ({error.strerror}). {remedy}.") from error
    found = struct.unpack_from(f">{len(shape)}I", content.ljust(header), 4)
    # Two zeros, the type of bytes, and the number of dimensions.
    if len(content) < header or content[:4] != bytes([0, 0, 8, len(shape)]):
        raise RuntimeError(f"'{path}' is not a complete idx file. {remedy}.")
    if found != shape:
        raise RuntimeError(f"'{path}' must hold values of shape {shape}, got {found}. {remedy}.")
    if len(content) != size:
        raise RuntimeError(f"'{path}' is not a complete idx file. {remedy}.")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
    if len(shape) == 1:
        if (largest := int(values.max())) > 9:
            raise RuntimeError(f"'{path}' must hold labels from 0 to 9, got {largest}. {remedy}.")
        return values.long()
    return values
