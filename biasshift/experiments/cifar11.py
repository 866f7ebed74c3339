"""CIFAR-100, the 11-layer network: the experiments of Figures 4 and 5 (section 4.2 of the paper).

The constants are the paper's; those that it leaves open are marked, with the reason for the choice. Figure 5 has every
activation with and without ``--batch-norm``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from biasshift.data import DataSet
from biasshift.experiments.experiment import Activation, Experiment
from biasshift.nets import cifar11
from biasshift.picturing import Geometry, Setting, checked, epoch_steps, loaded, schedule, small_images, smoked
from biasshift.trials import Trial
from biasshift.watching import Quantity

STEPS = 165_000
SCHEDULE = ((35_000, 1.0), (50_000, 0.5), (50_000, 0.05), (30_000, 0.005))  # updates, share of the learning rate
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 100  # open: makes 165,000 updates 330 epochs
ACTIVATIONS: tuple[Activation, ...] = ("elu", "srelu", "lrelu", "relu")
SEEDS = 10
GEOMETRY: Geometry = "same"  # open: "caffe" is probably the original, but costs twice as much
PREPROCESSING = "gcn-zca"
IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class Cifar11(Experiment):
    """Train the paper's 11-layer networks on CIFAR-100, instrumented."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds."""
    seeds: int = SEEDS
    steps: int = STEPS
    """Updates. The learning rate's schedule is shortened or stretched with them."""
    batch_norm: bool = False
    """Normalize every hidden layer before its activation: the other half of Figure 5."""
    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    data: Path | None = None
    """Folder that holds the data set in torchvision's layout. Default: $BIASSHIFT_DATA, else ./data; downloaded where it is missing."""
    out: Path = Path("runs/cifar11")
    """Run folders are written below."""
    lr: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    weight_decay: float = WEIGHT_DECAY
    geometry: Geometry = GEOMETRY
    """"same" has maps of 32-16-8-4-2-1-1-1, "caffe" of 32-16-8-5-3-2-1-1."""
    preprocessing: Literal["gcn-zca", "mean"] = PREPROCESSING
    """Global contrast normalization and ZCA whitening; or pixels in [0, 1] less their mean."""
    augment: bool = True
    """Random crops of the images with a frame of four zeros, and horizontal flips."""
    init: Literal["normal", "uniform"] = "normal"
    score_every: int = 500
    """Updates between two looks at the test error; the training loss is the mean over the minibatches in between."""
    test_images: int = 10_000
    """Of the test set, the first ones, that it is measured on."""
    instrument: tuple[Quantity, ...] = ("activations", "bias_shift")
    """What is measured along the run, in every layer."""
    every: int = 500
    """Updates between two measurements."""
    probe: int = 500
    """Training examples that they are made on."""
    units: int = 4
    """Units of every layer in the unit Fisher matrices."""
    damping: float = 1e-3

    name: ClassVar[str] = "cifar11"

    def load(self) -> DataSet:
        """The data set, checked and whitened, on the device."""
        return loaded(self)

    def settings(self) -> list[Setting]:
        """One per run."""
        checked(self)
        found = [
            Setting(
                self.name, self.dataset, activation, seed, self.steps, self.steps / epoch_steps(IMAGES, self.batch_size), self.batch_size,
                self.lr, self.momentum, self.weight_decay, self.geometry, self.batch_norm, self.preprocessing, self.augment, self.init,
                1.0, self.score_every, self.test_images, self.probe, self.every, self.instrument, self.units, self.damping,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]  # fmt: skip
        return [smoked(setting) for setting in found if setting.seed < 1] if self.smoke else found

    def folder(self, setting: Setting) -> Path:
        """The folder of a run."""
        return self.out / f"{setting.activation}{'-bn' if setting.batch_norm else ''}-{setting.seed}"

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        model = cifar11(
            setting.activation, setting.seed, data.classes, setting.geometry, setting.batch_norm, init=self.init, width=setting.width
        )
        return small_images(setting, data, model, schedule(SCHEDULE, setting.steps, setting.lr))
