"""What the experiments have in common: where runs go, what computes them, and how they are begun,
resumed and replaced.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from biasshift.distributed import local_device, under_torchrun
from biasshift.precision import Precision
from biasshift.training.trial import Execution, Exist, Trial

REPLACE_OR_RESUME = "--replace and --resume exclude each other: begin anew, or go on."
Activation = Literal["elu", "relu", "lrelu", "srelu"]


# -- options that are out of their range -------------------------------------------------------


def at_least_one(options: Any, *names: str) -> None:
    """Refuses options below 1."""
    _refuse_unless(options, names, "at least 1", lambda value: value >= 1)


def positive(options: Any, *names: str) -> None:
    """Refuses options that are not above 0 and finite."""
    _refuse_unless(options, names, "a number above 0", lambda value: 0 < value < math.inf)


def shares(options: Any, *names: str) -> None:
    """Refuses options outside [0, 1)."""
    _refuse_unless(options, names, "in [0, 1)", lambda value: 0 <= value < 1)


def not_negative(options: Any, *names: str) -> None:
    """Refuses options below 0, and those that are not finite."""
    _refuse_unless(options, names, "a number of at least 0", lambda value: 0 <= value < math.inf)


def distinct(name: str, values: tuple) -> None:
    """Refuses an empty list, and one with a value twice."""
    if len(set(values)) != len(values) or not values:
        raise ValueError(f"{flag(name)} needs at least one value, and each of them once.")


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


def _refuse_unless(
    options: Any, names: tuple[str, ...], said: str, test: Callable[[float], bool]
) -> None:
    for name in names:
        if not test(getattr(options, name)):
            raise ValueError(f"{flag(name)} must be {said}, got {getattr(options, name)}.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The options of every experiment that do not change what its numbers mean."""

    out: Path = field(default_factory=lambda: Path("runs"))
    """Run folders are written below."""
    replace: bool = False
    """Replace runs that are already there."""
    resume: bool = False
    """Go on where an interrupted command stopped: finished runs stay, the others continue from
    their last checkpoint.
    """
    workers: int | None = None
    """Processes, of small networks alone: by default one per core. Results do not depend on it."""
    ensemble: bool = False
    """Train all seeds of a setting at once, as one vmapped program: nearly free on a GPU, for small
    networks.
    """
    device: str = "auto"
    """"auto" is the GPU where there is one; or cpu, cuda, cuda:1, …"""
    precision: Precision = "float32"
    """Of training alone: measurements are always in float32 without TF32, their sums in float64."""
    compile: bool = False
    """Train through torch.compile."""
    graph: bool = False
    """Record training steps as CUDA graphs and replay them: for small networks on a GPU, by plain
    gradient descent.
    """
    channels_last: bool = False
    """Keep the maps of convolutions with their channels innermost: faster on GPUs with Tensor
    Cores.
    """
    keep_weights: bool = False
    """Leave a finished run's last checkpoint in its folder."""
    checkpoint_seconds: float = 30.0
    """At least so much time between two checkpoints, which are taken when a run's scores are."""
    tensorboard: bool = False
    """Write the scores for TensorBoard, too, into the run folders."""
    smoke: bool = False
    """Seconds: a few steps of a tiny version on synthetic data, to see that everything works."""

    name: ClassVar[str]
    figures: ClassVar[tuple[str, ...]] = ()
    sweeps: ClassVar[bool] = False  # runs differ in more than activation and seed
    small: ClassVar[bool] = (
        False  # one core is enough for a run, so that runs are computed side by side
    )

    @property
    def whole(self) -> bool:
        """Whether the runs of this command are all that its figures are to show."""
        return True

    def settings(self) -> list[Any]:
        """One dataclass per run: what its folder records. Has ``experiment``, ``activation`` and
        ``seed``.
        """
        raise NotImplementedError

    def load(self) -> Any:
        """The data, checked; on `where()`."""
        raise NotImplementedError

    def trial(self, setting: Any, data: Any) -> Trial:
        """What a setting trains and measures."""
        raise NotImplementedError

    def folder(self, setting: Any) -> Path:
        """The folder of a run."""
        return self.out / f"{setting.activation}-{setting.seed}"

    def alike(self, setting: Any) -> Hashable:
        """Equal for the runs that an ensemble trains together: those that differ in nothing but
        their seed.
        """
        return tuple(value for name, value in vars(setting).items() if name != "seed")

    def where(self) -> torch.device:
        """The device that computes.

        Raises:
            ValueError: there is no such device here.
        """
        name = (
            self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"--device: there is no kind of device '{name}'; try cpu or cuda."
            ) from None
        if device.type == "cuda" and not (
            torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        ):
            raise ValueError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch "
                "can use; leave the option out."
            )
        return local_device(device)

    def exist(self) -> Exist:
        """What to do about runs that are there."""
        return "resume" if self.resume else "replace" if self.replace else "refuse"

    def execution(self) -> Execution:
        """How trials are computed."""
        return Execution(
            self.precision,
            self.compile,
            self.graph,
            self.channels_last,
            self.checkpoint_seconds,
            self.keep_weights,
            self.tensorboard,
        )

    def check(self) -> None:
        """Refuses options that are out of their range or exclude each other.

        Raises:
            ValueError: the sentence names the option.
        """
        self.where()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}.")
        if (self.workers or 1) > 1 and not self.small:
            raise ValueError(
                f"--workers: a run of {self.name} takes all cores, and runs follow each other; "
                "leave it out."
            )
        if self.replace and self.resume:
            raise ValueError(REPLACE_OR_RESUME)
        if self.channels_last and self.small:
            raise ValueError(
                "--channels-last is about convolutions, and these networks have none: leave it out."
            )
        if self.precision == "tf32" and self.where().type != "cuda":
            raise ValueError("--precision tf32 needs a GPU: leave it out.")
        if self.ensemble and (self.precision != "float32" or self.compile):
            raise ValueError(
                "--ensemble trains in float32 and uncompiled: leave --precision and --compile out."
            )
        if self.precision == "float16" and (self.where().type != "cuda" or self.graph):
            raise ValueError(
                "--precision float16 needs a GPU, and no --graph: choose bfloat16 or float32."
            )
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "--tensorboard needs TensorBoard: pip install tensorboard, or leave it out."
            )
        if self.graph and (
            self.where().type != "cuda" or self.ensemble or self.compile or under_torchrun()
        ):
            raise ValueError(
                "--graph needs a GPU, and one process that trains one network, uncompiled: leave "
                "it out."
            )
        if under_torchrun() and (self.ensemble or (self.workers or 1) > 1):
            raise ValueError(
                "Under torchrun all processes train one network: leave --ensemble and --workers "
                "out."
            )
