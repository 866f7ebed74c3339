"""MNIST, 8 hidden layers × 128 units: the experiment of Figure 2 (section 4.1 of the paper); and 5
× 256, that of Figure 7.

The constants are the paper's; those that it leaves open are marked, with the reason for the choice.
Figure 7 is ``--depth 5 --width 256 --epochs 200 --activation elu relu``.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from biasshift.data import DataSet, mnist, synthetic_mnist
from biasshift.experiments.experiment import (
    Activation,
    Experiment,
    at_least_one,
    distinct,
    not_negative,
    positive,
    shares,
)
from biasshift.experiments.mlp_trial import Setting, trial
from biasshift.training.trial import Trial

DEPTH, WIDTH = 8, 128  # hidden layers and their units
BATCH_SIZE = 64
LEARNING_RATE = 0.01
EPOCHS = 300  # the unit means are flat after 25
SEEDS = 5
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu")  # Figure 2 has no SReLU
INIT = (
    "normal"  # open: He et al. 2015 use the normal distribution; --init uniform is U(±√(6/fan_in))
)
MOMENTUM = 0.0  # open: the paper names none for this experiment
PROBE = 5_000  # open: "a fixed subset of the training data"
EXAM_PROBE = (
    25_000  # two of them are all 50,000: unit Fisher statistics need many effective samples
)
EQUAL_LOSS = 0.5  # nats: early enough that most units have them


@dataclass(frozen=True, kw_only=True)
class Mnist(Experiment):
    """Train the paper's MNIST networks, instrumented, and say what the runs show."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds."""
    seeds: int = SEEDS
    """Runs per activation function. Run i of all of them starts from the same weights and sees the
    same batches.
    """
    epochs: int = EPOCHS
    data: Path | None = None
    """Folder that holds MNIST/raw. Default: $BIASSHIFT_DATA, else ./data; downloaded where it is
    missing.
    """
    out: Path = Path("runs/mnist")
    """Run folders are written below."""
    lr: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    depth: int = DEPTH
    width: int = WIDTH
    init: Literal["normal", "uniform"] = INIT
    probe: int = PROBE
    """Training examples that everything is measured on along the run. Of unit Fisher matrices
    behind the first epoch, most units have enough effective samples with 50,000.
    """
    exam_probe: int = EXAM_PROBE
    """Training examples in each of the two disjoint probes of the examination at equal loss."""
    means_every: int = 1
    """Epochs between two measurements of activation means and bias shifts."""
    fisher_every: int = 5
    """Epochs between two measurements of unit Fisher matrices and gradient gaps; 0: none."""
    equal_loss: float = EQUAL_LOSS
    """Training loss (nats) at which activations are compared: it leaves most units enough effective
    samples.
    """
    units: int = 16
    """Measured units of every hidden layer, evenly spaced."""
    damping: float = 1e-3

    name: ClassVar[str] = "mnist"
    figures: ClassVar[tuple[str, ...]] = ("2", "gap")
    small: ClassVar[bool] = True

    def load(self) -> DataSet:
        """MNIST, checked."""
        return (synthetic_mnist() if self.smoke else mnist(self.data)).to(self.where())

    def settings(self) -> list[Setting]:
        """One per run. The input layer's 784 inputs would need 7,840 effective samples: it is left
        out of the Fisher matrices.

        Raises:
            ValueError: for an option out of its range; the sentence names it.
        """
        self._check()
        found = [
            Setting(
                self.name, activation, seed, self.epochs, self.batch_size, self.lr, self.momentum, self.depth, self.width, self.init,
                self.probe, self.exam_probe, self.means_every, self.fisher_every, self.equal_loss, self.units, self.damping,
                skip_input_layer=True,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]  # fmt: skip
        return [smoked(setting) for setting in found if setting.seed < 1] if self.smoke else found

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        return trial(setting, data)

    def _check(self) -> None:
        self.check()
        at_least_one(
            self,
            "seeds",
            "epochs",
            "batch_size",
            "depth",
            "width",
            "probe",
            "exam_probe",
            "means_every",
            "units",
        )
        positive(self, "lr", "equal_loss")
        shares(self, "momentum")
        not_negative(self, "damping", "fisher_every")
        distinct("activation", self.activation)


def smoked(setting: Setting) -> Setting:
    """A tiny version of a run."""
    return replace(setting, epochs=2, depth=2, width=12, means_every=1, fisher_every=2)
