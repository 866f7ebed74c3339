"""MNIST, 8 hidden layers × 128 units: the experiment of Figure 2 (section 4.1 of the paper).

Figure 7, of 5 × 256 units, is ``--depth 5 --width 256 --epochs 200 --activation elu relu``. The
constants are the paper's; those that it leaves open are marked, with the reason for the choice.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from biasshift.data import DataSet, mnist, synthetic_mnist
from biasshift.experiments.experiment import Activation
from biasshift.experiments.mlp_trial import SMOKE, MlpConfig, MlpExperiment

DEPTH, WIDTH = 8, 128  # hidden layers and their units
BATCH_SIZE = 64
LEARNING_RATE = 0.01
EPOCHS = 300  # the unit means are flat after 25
SEEDS = 5
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu")  # Figure 2 has no SReLU
# open: He et al. 2015 use the normal distribution; --init uniform is U(±√(6/fan_in))
INIT = "normal"
MOMENTUM = 0.0  # open: the paper names none for this experiment
PROBE = 5_000  # open: "a fixed subset of the training data"
# Two of them are all 50,000: unit Fisher statistics need many effective samples.
EXAM_PROBE = 25_000
EQUAL_LOSS = 0.5  # nats: early enough that most units have them


@dataclass(frozen=True, kw_only=True)
class Mnist(MlpExperiment):
    """Train the paper's MNIST networks, instrumented, and show what the runs say."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds. Also elu:α, lrelu:slope, or
    any module by package.module:Class."""
    seeds: int = SEEDS
    """Runs per activation function. Equal seeds start from equal weights and see equal batches."""
    epochs: int = EPOCHS
    """Passes over the training data."""
    data: Path | None = None
    """Folder with MNIST/raw; by default $BIASSHIFT_DATA, else ./data. Downloaded if missing."""
    out: Path = Path("runs/mnist")
    """Run folders are written below."""
    lr: float = LEARNING_RATE
    """Learning rate."""
    batch_size: int = BATCH_SIZE
    """Training examples per minibatch."""
    momentum: float = MOMENTUM
    """Momentum of gradient descent; 0 is none."""
    depth: int = DEPTH
    """Number of hidden layers."""
    width: int = WIDTH
    """Units of every hidden layer."""
    init: Literal["normal", "uniform"] = INIT
    """Distribution of the initial weights."""
    # With 50,000, most units have enough effective samples after the first epoch.
    probe: int = PROBE
    """Training examples that everything is measured on along the run."""
    exam_probe: int = EXAM_PROBE
    """Training examples in each of the two disjoint probes of the examination at equal loss."""
    means_every: int = 1
    """Epochs between two measurements of activation means and bias shifts."""
    fisher_every: int = 5
    """Epochs between two measurements of unit Fisher matrices and gradient gaps; 0: none."""
    # It leaves most units enough effective samples.
    equal_loss: float = EQUAL_LOSS
    """Training loss (nats) at which activations are compared."""
    units: int = 16
    """Measured units of every hidden layer, evenly spaced."""
    damping: float = 1e-3
    """Damping of the measured unit Fisher matrices."""

    name: ClassVar[str] = "mnist"
    figures: ClassVar[tuple[str, ...]] = ("2", "gap")
    presets: ClassVar = {  # half an hour of two cores; six pairs of seeds can decide
        "cpu": {"epochs": 50, "seeds": 6, "activation": ("elu", "relu", "lrelu", "srelu")}
    }
    smoke_config: ClassVar[dict[str, Any]] = SMOKE

    def load(self) -> DataSet:
        """Returns MNIST, checked, on the device; synthetic images of its shape for a smoke test.

        Raises:
            FileNotFoundError: Files are missing, and downloading them failed.
            RuntimeError: A file is damaged, or is not what its name says.
        """
        return (synthetic_mnist() if self.smoke else mnist(self.data)).to(self.where())

    def grid(self) -> list[MlpConfig]:
        """Returns one config per seed and activation function.

        The input layer's 784 inputs would need 7,840 effective samples: it is left out of the unit
        Fisher matrices.
        """
        return [
            self._filled(
                MlpConfig,
                experiment=self.name,
                activation=activation,
                seed=seed,
                probe_size=self.probe,
                exam_size=self.exam_probe,
                units_measured=self.units,
                skip_input_layer=True,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]
