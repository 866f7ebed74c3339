"""CIFAR-10 and CIFAR-100, the 18-layer network (its list has 19): the experiment of Table 1 (section 4.3 of the paper).

The constants are the paper's; those that it leaves open are marked, with the reason for the choice. Training has three parts:
dropout behind the last layer of every stack; behind all layers; behind all, with rates half as large again.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from biasshift.data import DataSet
from biasshift.experiments.experiment import Activation, Experiment
from biasshift.nets import cifar18
from biasshift.picturing import Geometry, Setting, checked, epoch_steps, loaded, schedule, small_images, smoked
from biasshift.trials import Phase, Trial
from biasshift.watching import Quantity

SCHEDULE = ((35_000, 1.0), (35_000, 0.1), (50_000, 0.1), (40_000, 0.1))  # updates, share of the learning rate
# Open: how long the first part goes on after the rate is divided by ten. As long again as before.
DROPOUT = (("last", 1.0), ("last", 1.0), ("all", 1.0), ("all", 1.5))
STEPS = sum(updates for updates, _ in SCHEDULE)
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 100
ACTIVATIONS: tuple[Activation, ...] = ("elu",)
SEEDS = 1
GEOMETRY: Geometry = "same"  # open: "caffe" is probably the original
PREPROCESSING = "gcn-zca"
IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class Cifar18(Experiment):
    """Train the paper's 18-layer network on CIFAR-10 or CIFAR-100, with its fine-tuning, instrumented."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds."""
    seeds: int = SEEDS
    steps: int = STEPS
    """Updates, fine-tuning included. The schedule is shortened or stretched with them."""
    batch_norm: bool = False
    """Normalize every hidden layer before its activation."""
    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    data: Path | None = None
    """Folder that holds the data set in torchvision's layout. Default: $BIASSHIFT_DATA, else ./data; downloaded where it is missing."""
    out: Path = Path("runs/cifar18")
    """Run folders are written below."""
    lr: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    weight_decay: float = WEIGHT_DECAY
    geometry: Geometry = GEOMETRY
    """"same" has maps of 32-16-8-4-2-1-1-1-1, "caffe" of 32-16-10-7-5-4-3-2-1."""
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

    name: ClassVar[str] = "cifar18"

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
        return self.out / f"{setting.activation}-{setting.dataset}{'-bn' if setting.batch_norm else ''}-{setting.seed}"

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        model = cifar18(
            setting.activation, setting.seed, data.classes, setting.geometry, setting.batch_norm, init=self.init, width=setting.width
        )
        return small_images(setting, data, model, schedule(SCHEDULE, setting.steps, setting.lr, _with_dropout))


def _with_dropout(number: int, phase: Phase) -> Phase:
    where, factor = DROPOUT[number]
    return replace(phase, where=where, factor=factor)
