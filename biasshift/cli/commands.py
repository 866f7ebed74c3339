"""The commands that read runs, as typed dataclasses; those that make runs are the experiments
themselves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Name = Literal[
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "table1",
    "theory1",
    "theory2",
    "theory3",
    "theory4",
    "bench",
    "gap",
    "all",
]


@dataclass(frozen=True)
class Figure:
    """Draw a figure of the paper, or of the theory, and say the numbers that it shows beside the
    paper's.
    """

    name: Annotated[tyro.conf.Positional[Name], tyro.conf.arg(metavar="NAME")]
    """1 (activation functions), 2 (MNIST: means and losses),
    3 (autoencoders), 4 (CIFAR-100), 5 (with batch norm),
    6 (ImageNet), 7 (variance of activations),
    table1 (test errors), theory1 or gap (gradient gap),
    theory2 (k), theory3 (parts of the bias shift),
    theory4 (is it causal?), bench (speed), or all."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders that contain them. Figure 1 needs none; without any, the tables that
    come with the package are drawn.
    """
    out: Path = Path("figures")
    """PNG and PDF are written here."""
    quick: bool = False
    """First train a shortened version, into the folder quick-NAME in --out. The figure says that it
    is one.
    """
    smoke: bool = False
    """With --quick: seconds, on synthetic data."""
    data: Path | None = None
    """With --quick: the folder of the data, as --data of what it trains."""
    save: Path | None = None
    """A folder to write the small table into that the figure shows, such as paper_figs/results."""


@dataclass(frozen=True)
class Claims:
    """Say which claims of the paper the runs support, in a table with its caveats."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that contain them."""
    out: Path = Path("claims")
    """The table is written here, as claims.md and claims.parquet."""


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
