"""What the experiments have in common: options, their ranges, and how runs are computed.

An experiment is a frozen dataclass of options, which is its command line too. It makes one config
per run, and one trial of each config.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch

from biasshift.activations import canonical, folder_part
from biasshift.distributed import local_device, processes_here, restarts, under_torchrun
from biasshift.nets.activation_modules import activation_constructor
from biasshift.precision import Precision
from biasshift.training.engine import Engine
from biasshift.training.trial import NO_TENSORBOARD, Execution, Exist, Trial

REPLACE_OR_RESUME = "--replace and --resume exclude each other: give one of them."
DEVICE = re.compile(r"cpu|cuda(:(?P<gpu>0|[1-9][0-9]{0,5}))?")
# The names of `biasshift.activations.ACTIVATIONS`, which the help shows; or elu:α, lrelu:slope, or
# an import path package.module:Class.
Activation = (
    Literal[
        "elu", "relu", "lrelu", "srelu", "prelu", "selu", "gelu", "silu", "mish", "softplus", "tanh"
    ]
    | str
)  # fmt: skip
T = TypeVar("T")
E = TypeVar("E", bound="Experiment")  # and not Self, which the tests' type checker cannot follow

# -- ranges of options -------------------------------------------------------------------------


class Range(NamedTuple):
    """What the value of an option must be.

    Args:
        words: What a message says behind "must be".
        holds: Whether a value is in the range; false for NaN.
    """

    words: str
    holds: Callable[[float], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("a number of at least 0", lambda value: 0 <= value < math.inf)
FRACTION = Range("in [0, 1)", lambda value: 0 <= value < 1)

_NAMES = {
    COUNT: "batch_size depth epochs every exam_probe means_every probe score_every scored "
    "scores_per_epoch seeds steps stride test_images units update_every valid_images width",
    POSITIVE: "equal_loss kl_clip lr",
    NOT_NEGATIVE: "damping fisher_every last_init loaders unit_damping weight_decay",
    FRACTION: "dropout momentum",
}
# An option has one range in all experiments, unless the ``ranges`` of a class say otherwise; of a
# list, all values must be in it.
RANGES = {name: kind for kind, names in _NAMES.items() for name in names.split()}
# Counts of which one more costs memory or a process at once, before anything is trained.
MOST = {"depth": 10_000, "loaders": 1_000, "seeds": 10_000, "width": 1_000_000, "workers": 1_000}
LISTS = ("activation", "update", "lr")  # of distinct values, where they are lists


# -- experiments -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The options of every experiment that do not change what its numbers mean.

    A subclass adds its own options and implements `grid`, `load` and `trial`. It says in
    ``smoke_config`` which fields of a config ``--smoke`` replaces. The docstrings of options are
    the help of the command line.

    >>> from biasshift.experiments.mnist import Mnist
    >>> mnist = Mnist(activation=("elu", "relu"), seeds=3)
    >>> configs = mnist.configs()
    >>> len(configs), mnist.folder(configs[-1]).as_posix()
    (6, 'runs/mnist/relu-2')
    >>> Mnist(lr=0.0).configs()
    Traceback (most recent call last):
        ...
    ValueError: --lr must be a number above 0, got 0.0.
    """

    out: Path = field(default_factory=lambda: Path("runs"))
    """Run folders are written below."""
    replace: bool = False
    """Replace runs that are already there."""
    resume: bool = False
    """Continue an interrupted command: finished runs stay, others go on from their checkpoint."""
    workers: int | None = None
    """Processes, of small networks alone: by default one per core. Results do not depend on it."""
    ensemble: bool = False
    """Train all seeds at once as one vmapped program: nearly free on a GPU, for small networks."""
    device: str = "auto"
    """"auto" is the GPU where there is one; or cpu, cuda, cuda:1, …"""
    precision: Precision = "float32"
    """Of training alone: measurements are always in float32 without TF32, their sums in float64."""
    compile: bool = False
    """Train through torch.compile."""
    graph: bool = False
    """Replay training steps as CUDA graphs: for small networks on a GPU, by gradient descent. With
    --ensemble, one graph has the steps of all seeds."""
    channels_last: bool = False
    """Keep the channels of feature maps innermost: faster on GPUs with Tensor Cores, and always so
    on CPUs."""
    keep_weights: bool = False
    """Leave a finished run's last checkpoint in its folder."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints, which are saved when a run is scored."""
    tensorboard: bool = False
    """Write the scores for TensorBoard too, into the run folders."""
    preset: Literal["paper", "cpu"] = "paper"
    """Other defaults: "cpu" has a small network and a short run, for hours of two cores."""
    smoke: bool = False
    """Seconds: a few steps of a tiny version on synthetic data, to see that everything works."""

    name: ClassVar[str]
    figures: ClassVar[tuple[str, ...]] = ()
    sweeps: ClassVar[bool] = False  # runs differ in more than activation and seed
    small: ClassVar[bool] = False  # one core is enough for a run: runs are computed side by side
    ranges: ClassVar[dict[str, Range]] = RANGES
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # name → defaults that it replaces
    smoke_config: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        # One spelling of every activation function: runs record it, and folders are named by it.
        if isinstance(named := vars(self).get("activation"), tuple):
            object.__setattr__(self, "activation", tuple(map(_spelled, named)))

    @classmethod
    def of_preset(cls: type[E], preset: str, **options: Any) -> E:
        """Returns the experiment with the defaults of a preset where `options` do not name others.

        Args:
            preset: "paper", or one of ``presets``.
            options: As in the constructor.

        Raises:
            ValueError: The experiment has no such preset.

        >>> from biasshift.experiments.cifar11 import Cifar11
        >>> small = Cifar11.of_preset("cpu", seeds=2)
        >>> small.width, small.seeds
        (0.25, 2)
        """
        known = ["paper", *cls.presets]
        if preset not in known:
            raise ValueError(
                f"--preset of {cls.name} must be one of {', '.join(known)}, got '{preset}'."
            )
        return cls(**{**cls.presets.get(preset, {}), "preset": preset, **options})

    @property
    def whole(self) -> bool:
        """Whether the runs of this command are all that its figures are to show."""
        return True

    def configs(self) -> list[Any]:
        """Returns one dataclass per run: what its folder records.

        Every config has ``experiment``, ``activation`` and ``seed``. A smoke test keeps the first
        seed alone and makes each of its runs tiny.

        Raises:
            ValueError: An option is out of its range or excludes another; the message names it.
        """
        self.check()
        if not self.smoke:
            return self.grid()
        first = [config for config in self.grid() if config.seed < 1]
        return [dataclasses.replace(config, **self.smoke_config) for config in first]

    def grid(self) -> list[Any]:
        """Returns the configs of all runs in full size, seed by seed, from checked options.

        `configs` calls it, and makes the runs of a smoke test of them. A command that is stopped
        has whole seeds, which can be compared in pairs.
        """
        raise NotImplementedError

    def load(self) -> Any:
        """Returns the data, checked and on the device of `where`.

        What it returns is handed to `trial` unchanged. Every worker process loads it once.
        """
        raise NotImplementedError

    def trial(self, config: Any, data: Any) -> Trial:
        """Returns the network of a config, its minibatches, and what is measured along the run.

        Args:
            config: One of those that `configs` returns.
            data: What `load` returns.
        """
        raise NotImplementedError

    def folder(self, config: Any) -> Path:
        """Returns the run folder of a config, below ``out``; no two configs have the same."""
        return self.out / f"{folder_part(config.activation)}-{config.seed}"

    def alike(self, config: Any) -> Hashable:
        """Returns a key that is equal for runs which differ in nothing but their seed.

        An ensemble trains those together. The key has all fields of the config but the seed.
        """
        return tuple(value for name, value in vars(config).items() if name != "seed")

    def where(self) -> torch.device:
        """Returns the device that computes: under torchrun, the GPU of this process.

        "auto" is the GPU where PyTorch finds one, and the CPU elsewhere.

        Raises:
            ValueError: The device is neither the CPU nor a GPU of CUDA, or PyTorch finds no such
                GPU on this machine, or processes of torchrun would share one.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = self.device if self.device != "auto" else "cuda" if gpus else "cpu"
        known = DEVICE.fullmatch(name)
        if known is None:
            raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}.")
        if name != "cpu" and int(known["gpu"] or 0) >= gpus:
            raise ValueError(
                f"--device {name} must be a GPU, and PyTorch finds {gpus} of them on this "
                "machine. Leave the option out."
            )
        if known["gpu"] and processes_here() > 1:
            raise ValueError(
                f"--device must be cuda under torchrun, where every process has a GPU of its own, "
                f"got '{name}'."
            )
        device = local_device(torch.device(name))
        if device.type == "cuda" and (device.index or 0) >= gpus:
            raise ValueError(
                f"'torchrun' must start one process for each of the {gpus} GPUs of a machine, and "
                f"this is number {device.index + 1}. Give a lower --nproc-per-node."
            )
        return device

    def exist(self) -> Exist:
        """Returns what to do about runs that are there: "refuse", "replace" or "resume".

        Those of a command that `torchrun` has started again are its own, and are resumed.
        """
        restarted = restarts() > 0 and not self.replace
        return "resume" if self.resume or restarted else "replace" if self.replace else "refuse"

    def launch(self) -> Callable[[], Engine] | None:
        """Returns what starts the engine that runs are sent to; None: they stay on this machine."""
        return None

    def sent(self: E) -> E:
        """Returns the same options for processes that may work in another folder."""
        return self

    def execution(self) -> Execution:
        """Returns how trials are computed: precision, compilation, checkpoints, TensorBoard.

        None of these options changes what the numbers of a run mean, and no config records them.
        """
        channels_last = self.channels_last or (self.where().type == "cpu" and not self.small)
        return self._filled(
            Execution, compiled=self.compile, graphed=self.graph, channels_last=channels_last
        )

    def check(self) -> None:
        """Refuses options that are out of their range or exclude each other.

        A subclass that has more to refuse extends it. `configs` calls it before anything else.

        Raises:
            ValueError: The message names the option and the remedy.
        """
        on_gpu = self.where().type == "cuda"
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}.")
        if (self.workers or 1) > 1 and not self.small:
            raise ValueError(
                f"--workers must be left out: a run of {self.name} takes all cores, so that runs "
                "follow each other."
            )
        if self.replace and self.resume:
            raise ValueError(REPLACE_OR_RESUME)
        self._check_preset()
        if self.channels_last and self.small:
            raise ValueError(
                "--channels-last must be left out: these networks have no convolutions."
            )
        if self.precision == "tf32" and not on_gpu:
            raise ValueError("--precision tf32 needs a GPU: leave it out.")
        if self.ensemble and (self.precision != "float32" or self.compile):
            raise ValueError(
                "--ensemble trains in float32 and uncompiled: leave --precision and --compile out."
            )
        if self.precision == "float16" and (not on_gpu or self.graph):
            raise ValueError(
                "--precision float16 needs a GPU, and no --graph: choose bfloat16 or float32."
            )
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(NO_TENSORBOARD)
        if self.graph and (not on_gpu or self.compile or under_torchrun()):
            raise ValueError(
                "--graph needs a GPU, and one process that trains uncompiled: leave it out."
            )
        if under_torchrun() and (self.ensemble or (self.workers or 1) > 1):
            raise ValueError(
                "Under torchrun all processes train one network: leave --ensemble and --workers "
                "out."
            )
        self._check_ranges()
        for name in vars(self).get("activation", ()):
            activation_constructor(name, "--activation")

    def _check_preset(self) -> None:
        if self.preset == "paper":
            return
        if self.preset not in self.presets:
            raise ValueError(
                f"--preset of {self.name} must be paper, got '{self.preset}'. Leave it out."
            )
        usual = {each.name: each.default for each in dataclasses.fields(self)}
        if all(vars(self)[name] == usual[name] for name in self.presets[self.preset]):
            raise ValueError(
                f"'preset' alone changes no option: call {type(self).__name__}.of_preset("
                f"'{self.preset}') for its defaults."
            )

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, tuple) else (value,)
            if name in self.ranges:
                words, holds = self.ranges[name]
                for each in values:
                    if each is not None and not holds(each):
                        message = f"{option} must be {words}, got {each}."
                        raise ValueError(message)
            for each in values if name in MOST else ():
                if each is not None and each > MOST[name]:
                    message = f"{option} must be at most {MOST[name]:,}, got {each:,}."
                    raise ValueError(message)
            if name in LISTS and len(set(values)) < max(len(values), 1):
                message = f"{option} needs at least one value, and each of them once."
                raise ValueError(message)

    def _filled(self, kind: type[T], **values: Any) -> T:
        """A dataclass of the options that have the name of one of its fields, and of ``values``."""
        names = kind.__annotations__
        options = {name: value for name, value in vars(self).items() if name in names}
        return kind(**options | values)


def _spelled(name: Any) -> Any:
    """The one spelling of a name; what is not one stays as it is, for `Experiment.check`."""
    try:
        return canonical(name)
    except ValueError:
        return name
