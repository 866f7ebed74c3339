"""The options of the commands that read runs.

Those of the commands that make runs are the experiments themselves. A docstring here is the help of
its command or option.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Paper = Literal["1", "2", "3", "4", "5", "6", "7", "table1"]
Theory = Literal["theory1", "theory2", "theory3", "theory4", "gap"]
Name = Literal[Paper, Theory, "bench", "all"]
Folders = tyro.conf.Positional[tuple[Path, ...]]


@dataclass(frozen=True)
class Figure:
    """Draw a figure of the paper or of the theory, and print its numbers beside the paper's."""

    name: Annotated[tyro.conf.Positional[Name], tyro.conf.arg(metavar="NAME")]
    """1 (activation functions), 2 (MNIST: means and losses),
    3 (autoencoders), 4 (CIFAR-100), 5 (with batch norm),
    6 (ImageNet), 7 (variance of activations),
    table1 (test errors), theory1 or gap (gradient gap),
    theory2 (k), theory3 (parts of the bias shift),
    theory4 (is it causal?), bench (speed), or all."""
    runs: Annotated[Folders, tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    """Run folders, or folders that contain them. Without any, the package's tables are drawn."""
    out: Path = Path("figures")
    """Folder for the PNG and the PDF."""
    quick: bool = False
    """Train a shortened version first, into --out/quick-NAME. The figure is marked as quick."""
    smoke: bool = False
    """With --quick: train for seconds, on synthetic data."""
    data: Path | None = None
    """With --quick: the folder of the data, as --data of the training command."""
    save: Path | None = None
    """Folder for the small table that the figure shows, such as paper_figs/results."""


@dataclass(frozen=True)
class Claims:
    """Judge which claims of the paper the runs support, in a table with caveats."""

    runs: Annotated[Folders, tyro.conf.arg(help_behavior_hint="(required)")]
    """Run folders, or folders that contain them."""
    out: Path = Path("claims")
    """Folder for the table, as claims.md and claims.parquet."""


@dataclass(frozen=True)
class Runs:
    """List run folders with their state, their last step and their last numbers."""

    runs: Folders = (Path("runs"),)
    """Run folders, or folders that contain them."""


@dataclass(frozen=True)
class Report:
    """Make one self-contained page for looking at runs."""

    runs: Annotated[Folders, tyro.conf.arg(help_behavior_hint="(required)")]
    """Run folders, or folders that contain them."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page, an HTML file that opens from the disk."""
