"""CIFAR-100, the 11-layer network: the experiments of Figures 4 and 5 (section 4.2 of the paper).

The constants are the paper's; those that it shares with the 18 layers stand in
`biasshift.experiments.cifar`. Figure 5 has every activation with and without ``--batch-norm``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from biasshift.experiments.cifar import CPU, GEOMETRY, Cifar, CifarConfig, Geometry
from biasshift.experiments.convnet_trial import phases_of
from biasshift.experiments.experiment import Activation
from biasshift.nets import cifar11
from biasshift.training.trial import Phase

STEPS = 165_000
# updates, share of the learning rate
SCHEDULE = ((35_000, 1.0), (50_000, 0.5), (50_000, 0.05), (30_000, 0.005))
ACTIVATIONS: tuple[Activation, ...] = ("elu", "srelu", "lrelu", "relu")
SEEDS = 10


@dataclass(frozen=True, kw_only=True)
class Cifar11(Cifar):
    """Train the paper's 11-layer networks on CIFAR-100, instrumented."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    seeds: int = SEEDS
    steps: int = STEPS
    """Updates. The learning rate's schedule is shortened or stretched with them."""
    batch_norm: bool = False
    """Normalize every hidden layer before its activation: the other half of Figure 5."""
    out: Path = Path("runs/cifar11")
    geometry: Geometry = GEOMETRY
    """"same" has maps of 32-16-8-4-2-1-1-1, "caffe" of 32-16-8-5-3-2-1-1."""

    name: ClassVar[str] = "cifar11"
    network: ClassVar = staticmethod(cifar11)
    presets: ClassVar = {"cpu": CPU | {"width": 0.25, "steps": 2_000}}

    def paper_phases(self, config: CifarConfig) -> tuple[Phase, ...]:
        """Returns the learning rates of the paper's four parts, scaled to the steps of a config."""
        return phases_of(SCHEDULE, config.steps, config.lr)
