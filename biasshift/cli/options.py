"""The commands that read runs, as typed dataclasses; those that make runs are the experiments themselves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Figure:
    """Draw a figure from run folders."""

    name: tyro.conf.Positional[Literal["1", "2", "gap", "all"]]
    """1 (activation functions), 2 (unit means and learning curves), gap (gradient gap against mean activation), or all."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders that contain them. Figure 1 needs none."""
    out: Path = Path("figures")
    """PNG and PDF are written here."""


@dataclass(frozen=True)
class Claims:
    """Say which claims of the paper the runs support."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that contain them."""
    out: Path | None = None
    """A folder to write the table into, as claims.parquet and claims.md."""


@dataclass(frozen=True)
class Runs:
    """List run folders: their state, how far they are, and their last numbers."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Run folders, or folders that contain them."""


@dataclass(frozen=True)
class Report:
    """Make one self-contained page for looking at runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that contain them."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page, which opens from the disk."""
