"""Handwritten digits, a few and many: three splits each, ready for a training loop that never waits
for a loader.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from biasshift.data.augmentation import Scale
from biasshift.data.dataset import DataSet, data_root, obtain

# Each file of MNIST/raw and its shape. The original files, as torchvision unpacks them.
MNIST_FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
MNIST_TRAIN = 50_000  # [open in the paper] the last 10,000 of the 60,000 training images validate
DIGITS_TRAIN, DIGITS_VALID = 1_437, 180  # of 1,797 images; the remaining 180 test


def digits(seed: int = 0) -> DataSet:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels: 1,437 to train, 180 to validate, 180
    to test.

    Pixels are divided by 16, so that they lie in [0, 1]; they are not centered (mean .305, standard
    deviation .376). The data comes with scikit-learn: nothing is downloaded.

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
    (x_train, x_valid, x_test), (y_train, y_valid, y_test) = x.split(sizes), y.split(sizes)
    return DataSet("digits", 10, x_train, y_train, x_valid, y_valid, x_test, y_test)


def shifted(data: DataSet, side: int) -> DataSet:
    """The data set with every training image at nine places, moved by up to one pixel in each
    direction: ``views = 9``.

    An epoch shows every image once, at a random one of its places. All places of all images are the
    whole population that the network is trained on: expectations under the data over ``x_train``
    are exact, and rest on nine times the samples.

    Args:
        side: height and width of the flat, square images. Pixels that come in are 0.

    >>> shifted(digits(), side=8).x_train.shape
    torch.Size([12933, 64])
    """
    padded = torch.nn.functional.pad(data.x_train.view(-1, side, side), (1, 1, 1, 1))
    corners = [(1, 1)] + [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    views = [padded[:, i : i + side, j : j + side].flatten(1) for i, j in corners]
    return replace(
        data, x_train=torch.cat(views), y_train=data.y_train.repeat(len(views)), views=len(views)
    )


def mnist(
    root: str | Path | None = None, download: bool = True, *, as_bytes: bool = False
) -> DataSet:
    """MNIST, flat: the first 50,000 training images train, the last 10,000 validate, the 10,000
    test
        images test.

    Pixels are divided by 255, so that they lie in [0, 1]; they are not centered (mean .131,
    standard deviation .308). The paper leaves both open.

    Args:
        root: the folder that holds `MNIST/raw/`, torchvision's layout. Default: `$BIASSHIFT_DATA`,
            else `./data`.
        download: fetch the files that are missing. They appear under their names only when all of
            them are complete.
        as_bytes: leave the pixels as stored, in uint8, a quarter of the memory; ``Scale()`` makes
            the same numbers of them.

    Raises:
        FileNotFoundError: the files are not there, and downloading them was not allowed or failed.
        RuntimeError: a file is damaged, or is not what its name says.
    """
    raw = data_root(root) / "MNIST" / "raw"
    obtain("MNIST", raw, list(MNIST_FILES), _fetch_mnist, download, "MNIST/raw")
    x_train, y_train, x_test, y_test = (
        _read_idx(raw / name, shape) for name, shape in MNIST_FILES.items()
    )
    x_train, x_test = (
        x.flatten(1) if as_bytes else Scale()(x.flatten(1)) for x in (x_train, x_test)
    )
    n = MNIST_TRAIN
    return DataSet("mnist", 10, x_train[:n], y_train[:n], x_train[n:], y_train[n:], x_test, y_test)


def batches(
    x: Float[Tensor, "examples *inputs"],
    y: Int[Tensor, " examples"],
    batch_size: int,
    generator: torch.Generator,
    views: int = 1,
) -> Iterator[tuple[Float[Tensor, "batch *inputs"], Int[Tensor, " batch"]]]:
    """One epoch of shuffled minibatches; the last one is shorter where `batch_size` does not divide
    the examples.

    Args:
        generator: the source of the shuffle. Each call draws one permutation from it, and one view
            per example.
        views: how often every example stands in `x`; the epoch has each of them once.

    Raises:
        ValueError: `batch_size` is not positive, `views` does not divide the examples, or `x` and
            `y` differ in length.

    >>> x, y = torch.arange(5.0), torch.arange(5)
    >>> [len(labels) for _, labels in batches(x, y, 2, torch.Generator().manual_seed(0))]
    [2, 2, 1]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if len(x) != len(y):
        raise ValueError(
            f"x has {len(x)} examples and y has {len(y)} labels; they must be as many."
        )
    if views < 1 or len(x) % views:
        raise ValueError(f"{len(x)} examples are no {views} views of as many images.")
    images = len(x) // views
    # The order is drawn where the generator lives, so that a CPU generator gives the same batches
    # on every device.
    order = torch.randperm(images, generator=generator, device=generator.device)
    if views > 1:
        order = order + images * torch.randint(
            views, (images,), generator=generator, device=generator.device
        )
    order = order.to(x.device)
    return (
        (x.index_select(0, chosen), y.index_select(0, chosen)) for chosen in order.split(batch_size)
    )


def _fetch_mnist(folder: Path) -> Path:
    from torchvision.datasets import MNIST

    MNIST(folder, download=True)
    return folder / "MNIST" / "raw"


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The images (uint8) or labels (int64) of one file, checked."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    remedy = "the file is damaged or another data set's: delete it and run again with a network, or copy it anew."
    try:
        values = read_image_file(str(path)) if len(shape) == 3 else read_label_file(str(path))
    except OSError as error:
        raise RuntimeError(f"'{path}' cannot be read: {error.strerror}.") from error
    # which one depends on the byte that is wrong: torchvision asserts, indexes and reshapes
    except Exception as error:
        raise RuntimeError(f"'{path}' is no complete idx file: {remedy}") from error
    if tuple(values.shape) != shape:
        raise RuntimeError(
            f"'{path}' holds values of shape {tuple(values.shape)} where MNIST has {shape}: "
            f"{remedy}"
        )
    if len(shape) == 1 and values.max() > 9:
        raise RuntimeError(
            f"'{path}' holds the label {int(values.max())} where MNIST has 0 to 9: {remedy}"
        )
    return values
