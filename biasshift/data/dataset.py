"""A data set as tensors, the folder of the data sets, and the download of files that it lacks."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Int, Real
from torch import Tensor

from biasshift.atomic import replacing


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in three splits, for training, validation and testing.

    Args:
        name: of the data set, as runs record it.
        classes: the number of classes; `y` holds class numbers 0 … ``classes − 1``.
        x_train: inputs in float32, or in uint8 with pixels as stored; likewise in the other splits.
        views: how often every example stands in `x_train`: all examples once, then all again. An
            epoch shows each once.
    """

    name: str
    classes: int
    x_train: Real[Tensor, "train *inputs"]
    y_train: Int[Tensor, " train"]
    x_valid: Real[Tensor, "valid *inputs"]
    y_valid: Int[Tensor, " valid"]
    x_test: Real[Tensor, "test *inputs"]
    y_test: Int[Tensor, " test"]
    views: int = 1

    def to(self, device: torch.device | str) -> "DataSet":
        """Returns the same data set with all its tensors on `device`."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in fields(self)
            if field.name[:2] in ("x_", "y_")
        }
        return replace(self, **tensors)


def split(name: str, classes: int, x: Tensor, y: Tensor, sizes: Sequence[int]) -> DataSet:
    """Returns examples in their order as a data set.

    Args:
        name: of the data set.
        classes: the number of classes.
        x: inputs (examples, …).
        y: class numbers (examples,).
        sizes: the examples that train, validate and test; their sum is that of the examples.
    """
    (x_train, x_valid, x_test), (y_train, y_valid, y_test) = x.split(sizes), y.split(sizes)
    return DataSet(name, classes, x_train, y_train, x_valid, y_valid, x_test, y_test)


def data_root(root: str | Path | None = None) -> Path:
    """Returns the folder of the data sets: `root`, else `$BIASSHIFT_DATA`, else `./data`.

    A leading ``~`` becomes the home folder. The folder need not exist.
    """
    return Path(root or os.environ.get("BIASSHIFT_DATA") or "data").expanduser()


def obtain(
    name: str,
    root: str | Path | None,
    layout: str,
    files: Sequence[str],
    download: bool,
    extra: Sequence[str] = (),
) -> Path:
    """Returns the folder of a data set's files, and downloads those that are missing.

    torchvision downloads into a temporary folder and checks what arrives. Files appear under their
    names only when all of them are complete; files that exist are left alone.

    Args:
        name: of the data set; without hyphens also that of torchvision's class.
        root: the folder of the data sets, see `data_root`.
        layout: the folder of the files below `root`, in torchvision's layout.
        files: the names of the files that are needed.
        download: whether missing files may be downloaded.
        extra: files that are put in place too when others are downloaded, but may be missing.

    Raises:
        FileNotFoundError: files are missing, and downloading them was not allowed or failed.
    """
    folder = data_root(root) / layout
    missing = [file for file in files if not (folder / file).exists()]
    if not missing:
        return folder
    lacking = ", ".join(missing)
    remedy = f"Name the folder that holds {layout} with --data or $BIASSHIFT_DATA"
    if not download:
        raise FileNotFoundError(
            f"'{folder}' lacks {lacking} of {name}, and downloading is off. "
            f"{remedy}, or allow the download."
        )
    try:
        _download(
            name, folder, [*missing, *(f for f in extra if not (folder / f).exists())], layout
        )
    # RuntimeError: torchvision tried every mirror, or what came is damaged.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "no server answered"
        raise FileNotFoundError(
            f"'{folder}' lacks {lacking} of {name}, which cannot be downloaded ({reason}). "
            f"{remedy}, or try again with a network."
        ) from error
    return folder


def _download(name: str, folder: Path, files: Sequence[str], layout: str) -> None:
    from torchvision import datasets

    with tempfile.TemporaryDirectory() as elsewhere:
        getattr(datasets, name.replace("-", ""))(elsewhere, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            with replacing(folder / file) as part:
                shutil.copyfile(Path(elsewhere) / layout / file, part)
