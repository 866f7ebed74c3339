"""CIFAR-10 and CIFAR-100, the 18-layer network of Table 1 (section 4.3 of the paper).

The paper's list of its layers has 19. The constants are the paper's; those that it shares with the
11 layers stand in `biasshift.experiments.cifar`. Training has three parts: dropout behind the last
layer of every stack; behind all layers; behind all, with rates half as large again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from biasshift.activations import folder_part
from biasshift.experiments.cifar import CPU, GEOMETRY, Cifar, CifarConfig, Geometry, dropout_range
from biasshift.experiments.convnet_trial import phases_of
from biasshift.experiments.experiment import Activation
from biasshift.nets import cifar18
from biasshift.training.trial import Phase

# updates, share of the learning rate
SCHEDULE = ((35_000, 1.0), (35_000, 0.1), (50_000, 0.1), (40_000, 0.1))
# Open: how long the first part goes on after the rate is divided by ten. As long again as before.
DROPOUT: tuple[tuple[Literal["last", "all"], float], ...] = (
    ("last", 1.0),
    ("last", 1.0),
    ("all", 1.0),
    ("all", 1.5),
)
STEPS = sum(updates for updates, _ in SCHEDULE)
ACTIVATIONS: tuple[Activation, ...] = ("elu",)
SEEDS = 1


@dataclass(frozen=True, kw_only=True)
class Cifar18(Cifar):
    """Train the paper's 18-layer network on CIFAR-10 or CIFAR-100, with its fine-tuning."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    seeds: int = SEEDS
    steps: int = STEPS
    """Updates, fine-tuning included. The schedule is shortened or stretched with them."""
    out: Path = Path("runs/cifar18")
    geometry: Geometry = GEOMETRY
    """"same" has maps of 32-16-8-4-2-1-1-1-1, "caffe" of 32-16-10-7-5-4-3-2-1."""

    name: ClassVar[str] = "cifar18"
    network: ClassVar = staticmethod(cifar18)
    ranges: ClassVar = Cifar.ranges | {
        "dropout": dropout_range(max(factor for _, factor in DROPOUT))
    }
    presets: ClassVar = {"cpu": CPU | {"width": 0.125, "steps": 1_000, "score_every": 250}}

    def paper_phases(self, config: CifarConfig) -> tuple[Phase, ...]:
        """Returns the phases of the paper, scaled to the steps of a config.

        The learning rate comes down once, then dropout grows twice.
        """
        return phases_of(
            SCHEDULE,
            config.steps,
            config.lr,
            change=lambda number, phase: Phase(phase.start, phase.lr, *DROPOUT[number]),
        )

    def folder(self, config: CifarConfig) -> Path:
        """Returns the run folder of a config, whose name also tells the data set."""
        kind = f"{folder_part(config.activation)}-{config.dataset}{'-bn' * config.batch_norm}"
        return self.out / f"{kind}-{config.seed}"
