"""A data set as tensors, and where data sets lie."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Int, Real
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in three splits: `x` in float32, or in uint8 with pixels as stored; `y` the class numbers 0 … `classes` − 1."""

    name: str
    classes: int
    x_train: Real[Tensor, "train *inputs"]
    y_train: Int[Tensor, " train"]
    x_valid: Real[Tensor, "valid *inputs"]
    y_valid: Int[Tensor, " valid"]
    x_test: Real[Tensor, "test *inputs"]
    y_test: Int[Tensor, " test"]
    views: int = 1  # x_train holds every example this many times, all examples once, then all again; an epoch shows each once

    def to(self, device: torch.device | str) -> "DataSet":
        """The same data set with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name[:2] in ("x_", "y_")}
        return replace(self, **tensors)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets: `root`, else `$BIASSHIFT_DATA`, else `./data`."""
    return Path(root or os.environ.get("BIASSHIFT_DATA") or "data").expanduser()
