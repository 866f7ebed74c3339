"""What the two CIFAR protocols share: their options, the setting that a run records, and how it is
trained and measured.

The constants are the paper's (sections 4.2 and 4.3); those that it leaves open are marked, with the
reason for the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from biasshift.data import (
    Augment,
    DataSet,
    Scale,
    TensorStream,
    cifar10,
    cifar100,
    synthetic_cifar,
    whitened,
)
from biasshift.distributed import rank, world_size
from biasshift.experiments.convnet_trial import epoch_steps, momentum_sgd, scores_on_test
from biasshift.experiments.experiment import (
    Activation,
    Experiment,
    at_least_one,
    distinct,
    not_negative,
    positive,
    shares,
)
from biasshift.nets import set_dropout
from biasshift.training.trial import Instrumentation, Phase, Quantity, Trial

Geometry = Literal["same", "caffe"]

LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 100  # open for the 11 layers: makes their 165,000 updates 330 epochs
GEOMETRY: Geometry = (
    "same"  # open: "caffe" is probably the original, but costs the 11 layers twice as much
)
PREPROCESSING = "gcn-zca"
IMAGES = 50_000


@dataclass(frozen=True)
class Setting:
    """One run on small images. Runs with the same seed start from the same weights and see the same
    batches.
    """

    experiment: str
    dataset: str
    activation: str
    seed: int
    steps: int
    epochs: float  # what so many steps are
    batch_size: int
    lr: float  # the first
    momentum: float
    weight_decay: float
    geometry: Geometry
    batch_norm: bool
    preprocessing: str
    augmented: bool
    init: str
    width: float
    score_every: int  # steps
    test_images: int  # the first ones, that scores are taken on along the run; at the end on all
    probe_size: int
    every: int  # steps between measurements
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float


@dataclass(frozen=True, kw_only=True)
class Pictures(Experiment):
    """The options of both. An experiment adds its defaults, `network` and `phases`."""

    activation: tuple[Activation, ...]
    """Activation functions; each gets all seeds."""
    seeds: int
    steps: int
    batch_norm: bool = False
    """Normalize every hidden layer before its activation."""
    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    data: Path | None = None
    """Folder that holds the data set in torchvision's layout. Default: $BIASSHIFT_DATA, else
    ./data; downloaded where it is missing.
    """
    lr: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    weight_decay: float = WEIGHT_DECAY
    geometry: Geometry = GEOMETRY
    preprocessing: Literal["gcn-zca", "mean"] = PREPROCESSING
    """Global contrast normalization and ZCA whitening; or pixels in [0, 1] less their mean."""
    augment: bool = True
    """Random crops of the images with a frame of four zeros, and horizontal flips."""
    init: Literal["normal", "uniform"] = "normal"
    width: float = 1.0
    """Multiplies the units of every hidden layer: 0.25 is a version for a CPU."""
    score_every: int = 500
    """Updates between two looks at the test error; the training loss is the mean over the
    minibatches in between.
    """
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

    network: ClassVar[Callable[..., nn.Module]]  # as in `biasshift.nets.convnets`

    def phases(self, setting: Setting) -> tuple[Phase, ...]:
        """Learning rates and dropout along the way."""
        raise NotImplementedError

    def load(self) -> DataSet:
        """The data set, or something of its shape: checked and preprocessed, on the device."""
        data = (
            synthetic_cifar()
            if self.smoke
            else {"cifar10": cifar10, "cifar100": cifar100}[self.dataset](self.data)
        )
        if (
            self.preprocessing == "gcn-zca" and not self.smoke
        ):  # whose few images have no covariance to speak of
            return whitened(data, self.data).to(self.where())
        scale = Scale(mean=Scale()(data.x_train).mean(0))
        return replace(
            data, **{name: scale(getattr(data, name)) for name in ("x_train", "x_valid", "x_test")}
        ).to(self.where())

    def settings(self) -> list[Setting]:
        """One per run."""
        self._check()
        found = [
            Setting(
                self.name, self.dataset, activation, seed, self.steps, self.steps / epoch_steps(IMAGES, self.batch_size), self.batch_size,
                self.lr, self.momentum, self.weight_decay, self.geometry, self.batch_norm, self.preprocessing, self.augment, self.init,
                self.width, self.score_every, self.test_images, self.probe, self.every, self.instrument, self.units, self.damping,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]  # fmt: skip
        small = {
            "steps": 6,
            "epochs": 0.6,
            "batch_size": 20,
            "width": 0.03,
            "score_every": 3,
            "every": 3,
        }
        return (
            [replace(s, **small, probe_size=20, test_images=20) for s in found if s.seed < 1]
            if self.smoke
            else found
        )

    def folder(self, setting: Setting) -> Path:
        """The folder of a run."""
        return (
            self.out / f"{setting.activation}{'-bn' if setting.batch_norm else ''}-{setting.seed}"
        )

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        model = self.network(
            setting.activation,
            setting.seed,
            data.classes,
            setting.geometry,
            setting.batch_norm,
            init=setting.init,
            width=setting.width,
        )
        augment = Augment(pad=4) if setting.augmented else None
        stream = TensorStream(
            data.x_train,
            data.y_train,
            setting.batch_size,
            setting.seed,
            augment=augment,
            rank=rank(),
            world=world_size(),
        )
        instrumentation = Instrumentation(
            setting.quantities,
            setting.every,
            setting.probe_size,
            setting.units_measured,
            setting.damping,
            250,
        )
        probe = data.x_train[: setting.probe_size], data.y_train[: setting.probe_size]
        return Trial(
            setting,
            model.to(data.x_train.device),
            partial(momentum_sgd, momentum=setting.momentum, decay=setting.weight_decay),
            stream,
            setting.steps,
            self.phases(setting),
            score=partial(scores_on_test, data=data, images=setting.test_images),
            score_every=setting.score_every,
            schedules=instrumentation.schedules(
                model, probe, labels="expected" if data.classes <= 10 else "sampled"
            ),
            enter=lambda module, phase: set_dropout(module, phase.where, phase.factor),
        )

    def _check(self) -> None:
        self.check()
        at_least_one(
            self,
            "seeds",
            "steps",
            "batch_size",
            "score_every",
            "test_images",
            "every",
            "probe",
            "units",
        )
        positive(self, "lr", "width")
        shares(self, "momentum")
        not_negative(self, "weight_decay", "damping")
        distinct("activation", self.activation)
