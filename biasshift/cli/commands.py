"""The options of the commands that read runs.

Those of the commands that make runs are the experiments themselves. A docstring here is the help of
its command or option.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Optional

import tyro

Paper = Literal["1", "2", "3", "4", "5", "6", "7", "table1"]
Theory = Literal["theory1", "theory2", "theory3", "theory4", "gap"]
Name = Literal[Paper, Theory, "bench", "all"]


class Folders(tuple[Path, ...]):
    """Paths from the command line.

    A class of its own: tyro checks defaults that are a ``tuple[Path, ...]`` by a library whose
    import takes longer than all the rest of the help.
    """


NO_FOLDERS = Folders()
PATHS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[PATH [PATH ...]]",
    instance_from_str=lambda words: Folders(map(Path, words)),
    is_instance=lambda value: isinstance(value, Folders),
    str_from_instance=lambda folders: list(map(str, folders)),
)
Positionals = tyro.conf.Positional[Annotated[Folders, PATHS]]
OptionalPath = Optional[Path]  # noqa: UP045  that library checks ``Path | None``, too


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
    runs: Annotated[Positionals, tyro.conf.arg(help_behavior_hint="(default: none)")] = NO_FOLDERS
    """Run folders, or folders that contain them. Without any, the package's tables are drawn."""
    out: Path = Path("figures")
    """Folder for the PNG and the PDF."""
    quick: bool = False
    """Train a shortened version first, into --out/quick-NAME. The figure is marked as quick."""
    smoke: bool = False
    """With --quick: train for seconds, on synthetic data."""
    data: OptionalPath = None
    """With --quick: the folder of the data, as --data of the training command."""
    save: OptionalPath = None
    """Folder for the small table that the figure shows, such as paper_figs/results."""


@dataclass(frozen=True)
class Claims:
    """Judge which claims of the paper the runs support, in a table with caveats."""

    runs: Annotated[Positionals, tyro.conf.arg(help_behavior_hint="(required)")]
    """Run folders, or folders that contain them."""
    out: Path = Path("claims")
    """Folder for the table, as claims.md and claims.parquet."""
    json: bool = False
    """Print the table as JSON, for programs, and write no files."""


@dataclass(frozen=True)
class Runs:
    """List run folders with their state, their last step and their last numbers."""

    runs: Positionals = field(default_factory=lambda: Folders([Path("runs")]))
    """Run folders, or folders that contain them."""
    json: bool = False
    """Print the list as JSON, for programs."""


@dataclass(frozen=True)
class Report:
    """Make one self-contained page for looking at runs."""

    runs: Annotated[Positionals, tyro.conf.arg(help_behavior_hint="(required)")]
    """Run folders, or folders that contain them."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page, an HTML file that opens from the disk."""
