"""A data set as tensors, and where data sets lie."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Int, Real
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in three splits: `x` in float32, or in uint8 with pixels as stored; `y` the class
    numbers 0 … `classes` − 1.
    """

    name: str
    classes: int
    x_train: Real[Tensor, "train *inputs"]
    y_train: Int[Tensor, " train"]
    x_valid: Real[Tensor, "valid *inputs"]
    y_valid: Int[Tensor, " valid"]
    x_test: Real[Tensor, "test *inputs"]
    y_test: Int[Tensor, " test"]
    # x_train holds every example this many times, all examples once, then all again; an epoch shows
    # each once
    views: int = 1

    def to(self, device: torch.device | str) -> "DataSet":
        """The same data set with its tensors on `device`."""
        tensors = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if f.name[:2] in ("x_", "y_")
        }
        return replace(self, **tensors)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets: `root`, else `$BIASSHIFT_DATA`, else `./data`."""
    return Path(root or os.environ.get("BIASSHIFT_DATA") or "data").expanduser()


# -- files of a data set that are not there ----------------------------------------------------


def obtain(
    name: str,
    folder: Path,
    files: Sequence[str],
    fetch: Callable[[Path], Path],
    download: bool,
    layout: str,
    extra: Sequence[str] = (),
) -> None:
    """Make sure that `files` are in `folder`, or say in one sentence why they are not.

    Args:
        fetch: downloads into the folder it is given, checks what came, and returns the folder with
            the files.
        layout: what the folder named with `--data` has to hold.
        extra: files that are put in place too when others are downloaded, but may be missing.

    Raises:
        FileNotFoundError: files are missing, and downloading them was not allowed or failed.
    """
    missing = [file for file in files if not (folder / file).exists()]
    if not missing:
        return
    absent = f"{name} is not complete in '{folder}' (missing: {', '.join(missing)})"
    remedy = f"name the folder that holds {layout} with --data or $BIASSHIFT_DATA"
    if not download:
        raise FileNotFoundError(
            f"{absent}, and downloading is off: {remedy}, or allow the download."
        )
    try:
        _download(
            folder, [*missing, *(file for file in extra if not (folder / file).exists())], fetch
        )
    except (
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: torchvision tried every mirror, or what came is damaged
        reason = getattr(error, "strerror", None) or "no server answered"
        raise FileNotFoundError(
            f"{absent}, and it cannot be downloaded ({reason}): {remedy}, or try again with a "
            "network."
        ) from error


def _download(folder: Path, files: Sequence[str], fetch: Callable[[Path], Path]) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        fetched = fetch(Path(elsewhere))
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            part = folder / f"{file}.part"
            shutil.copyfile(fetched / file, part)
            part.replace(folder / file)
