"""What the two CIFAR experiments share: options, config, and how a run is trained and measured.

The constants are the paper's (sections 4.2 and 4.3); those that it leaves open are marked, with the
reason for the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from biasshift.activations import folder_part
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
from biasshift.experiments.convnet_trial import (
    INIT,
    LAST_INIT,
    epoch_steps,
    momentum_sgd,
    phases_of,
    scores_on_test,
)
from biasshift.experiments.experiment import (
    POSITIVE,
    RANGES,
    Activation,
    Experiment,
    Range,
)
from biasshift.nets import set_dropout
from biasshift.nets.convnets import RATES
from biasshift.nets.initialization import Init
from biasshift.training.trial import Instrumentation, Phase, Quantity, Trial

Geometry = Literal["same", "caffe"]
Schedule = Literal["paper", "late"]

LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 100  # open for the 11 layers: makes their 165,000 updates 330 epochs
# open: "caffe" is probably the original, but costs the 11 layers twice as much
GEOMETRY: Geometry = "same"
PREPROCESSING = "gcn-zca"
IMAGES = 50_000
# open: padding after whitening is with zeros, the mean of the whitened images, as in the paper's
# "four zero pixels"; before it the zeros would be black.
# open: batch normalization is before the activation, as in Ioffe & Szegedy 2015
LATE = ((70, 1.0), (20, 0.1), (10, 0.01))  # not the paper's: of runs that are much shorter
# An hour or two of early learning for both cores of a laptop, and not the paper's results: dropout
# of a network that is four to eight times narrower keeps it on the plateau of ln 100.
CPU: dict[str, Any] = {
    "batch_size": 50,
    "dropout": 0.0,
    "last_init": 0.01,
    "schedule": "late",
    "seeds": 6,
}


def dropout_range(most: float = 1.0) -> Range:
    """Returns what ``--dropout`` may be where the schedule multiplies rates by up to ``most``."""
    limit = 1 / (max(RATES) * most)
    words = f"in [0, {limit:.4g}), so that rates stay below 1"
    return Range(words, lambda value: 0 <= value < limit)


@dataclass(frozen=True)
class CifarConfig:
    """One run on small images, as its folder records it.

    Runs with the same seed start from the same weights and see the same minibatches.

    Args:
        epochs: What so many steps are, on the 50,000 training images.
        lr: The first learning rate.
        last_init: Standard deviation of the last layer's initial weights; None: that of ``init``.
        dropout: Multiplies the paper's dropout rates.
        schedule: Of the learning rate: the paper's, or one that falls at 70 and 90 %.
        width: Multiplies the units of every hidden layer.
        score_every: Steps between two scores.
        test_images: Those that scores are taken on, the first ones.
        probe_size: Training examples on which everything is measured along the run.
        every: Steps between two measurements.
        units_measured: Of every layer, evenly spaced, in the unit Fisher matrices.
    """

    experiment: str
    dataset: str
    activation: str
    seed: int
    steps: int
    epochs: float
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    geometry: Geometry
    batch_norm: bool
    preprocessing: str
    augmented: bool
    init: Init
    width: float
    score_every: int
    test_images: int
    probe_size: int
    every: int
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float
    last_init: float | None = None
    dropout: float = 1.0
    schedule: Schedule = "paper"


@dataclass(frozen=True, kw_only=True)
class Cifar(Experiment):
    """The options of both. An experiment adds its defaults, `network` and `phases`."""

    activation: tuple[Activation, ...]
    """Activation functions; each gets all seeds. Also elu:α, lrelu:slope, or
    any module by package.module:Class."""
    seeds: int
    """Runs per activation function."""
    steps: int
    batch_norm: bool = False
    """Normalize every hidden layer before its activation."""
    dataset: Literal["cifar10", "cifar100"] = "cifar100"
    """Data set that the networks train on."""
    data: Path | None = None
    """Data folder; by default $BIASSHIFT_DATA, else ./data. Downloaded if missing."""
    lr: float = LEARNING_RATE
    """Learning rate."""
    batch_size: int = BATCH_SIZE
    """Training examples per minibatch."""
    momentum: float = MOMENTUM
    """Momentum of gradient descent; 0 is none."""
    weight_decay: float = WEIGHT_DECAY
    """Weight decay, as in PyTorch's SGD."""
    geometry: Geometry = GEOMETRY
    preprocessing: Literal["gcn-zca", "mean"] = PREPROCESSING
    """Global contrast normalization and ZCA whitening; or pixels in [0, 1] less their mean."""
    augment: bool = True
    """Random crops of the images with a frame of four zeros, and horizontal flips."""
    dropout: float = 1.0
    """Multiplies the paper's dropout rates; 0 drops nothing."""
    schedule: Schedule = "paper"
    """Learning rates: the paper's, or a tenth from 70 % of the updates on and again from 90 %."""
    init: Init = INIT
    """Initial weights: normal or uniform of variance 2/fan_in (He et al. 2015), or normal of
    variance 1/fan_in (lecun) or 2/(fan_in + fan_out) (glorot)."""
    last_init: float | None = LAST_INIT
    """Standard deviation of the last layer's initial weights; None: as the other layers."""
    width: float = 1.0
    """Multiplies the units of every hidden layer: 0.25 is a version for a CPU."""
    score_every: int = 500
    """Updates between two test errors; training losses are means over the minibatches between."""
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
    """Damping of the measured unit Fisher matrices."""

    network: ClassVar[Callable[..., nn.Module]]  # as in `biasshift.nets.convnets`
    ranges: ClassVar[dict[str, Range]] = RANGES | {
        "width": POSITIVE,
        "dropout": dropout_range(),
    }
    smoke_config: ClassVar[dict[str, Any]] = {
        "steps": 6,
        "epochs": 0.6,
        "batch_size": 20,
        "width": 0.03,
        "score_every": 3,
        "every": 3,
        "probe_size": 20,
        "test_images": 20,
    }

    def phases(self, config: CifarConfig) -> tuple[Phase, ...]:
        """Returns learning rates and dropout along the way, for the steps of a config."""
        if config.schedule == "late":
            phases = phases_of(LATE, config.steps, config.lr)
        else:
            phases = self.paper_phases(config)
        return tuple(replace(phase, factor=config.dropout * phase.factor) for phase in phases)

    def paper_phases(self, config: CifarConfig) -> tuple[Phase, ...]:
        """Returns the phases of the paper, scaled to the steps of a config."""
        raise NotImplementedError

    def load(self) -> DataSet:
        """Returns the data set, checked and preprocessed, on the device.

        A smoke test gets a few synthetic images less their mean: they have no covariance to speak
        of that could be whitened.

        Raises:
            FileNotFoundError: Files are missing, and downloading them failed.
            RuntimeError: A file is damaged, or is not what its name says.
        """
        if self.smoke:
            data = synthetic_cifar()
        else:
            data = {"cifar10": cifar10, "cifar100": cifar100}[self.dataset](self.data)
            if self.preprocessing == "gcn-zca":
                return whitened(data, self.data).to(self.where())
        scale = Scale(mean=Scale()(data.x_train).mean(0))
        images = {name: scale(getattr(data, name)) for name in ("x_train", "x_valid", "x_test")}
        return replace(data, **images).to(self.where())

    def grid(self) -> list[CifarConfig]:
        """Returns one config per seed and activation function.

        The epochs that it records are those of 50,000 training images: 330 for the 165,000 updates
        of the 11 layers.
        """
        return [
            self._filled(
                CifarConfig,
                experiment=self.name,
                activation=activation,
                seed=seed,
                epochs=self.steps / epoch_steps(IMAGES, self.batch_size),
                augmented=self.augment,
                probe_size=self.probe,
                quantities=self.instrument,
                units_measured=self.units,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]

    def folder(self, config: CifarConfig) -> Path:
        """Returns the run folder of a config, named by activation, normalization and seed."""
        return (
            self.out / f"{folder_part(config.activation)}{'-bn' * config.batch_norm}-{config.seed}"
        )

    def trial(self, config: CifarConfig, data: DataSet) -> Trial:
        """Returns the network of a config, its minibatches and its measurements.

        Labels of the unit Fisher matrices are sampled where there are more than ten classes: all
        would take a backward pass each.
        """
        x, y = data.x_train, data.y_train
        model = self.network(
            config.activation,
            config.seed,
            data.classes,
            config.geometry,
            config.batch_norm,
            init=config.init,
            last_init=config.last_init,
            width=config.width,
        ).to(x.device)
        stream = TensorStream(
            x,
            y,
            config.batch_size,
            config.seed,
            augment=Augment(pad=4) if config.augmented else None,
            rank=rank(),
            world=world_size(),
        )
        instrumentation = Instrumentation(
            config.quantities,
            every=config.every,
            examples=config.probe_size,
            units=config.units_measured,
            damping=config.damping,
            batch_size=250,
        )
        labels = "expected" if data.classes <= 10 else "sampled"
        return Trial(
            config,
            model,
            partial(momentum_sgd, momentum=config.momentum, decay=config.weight_decay),
            stream,
            config.steps,
            self.phases(config),
            score=partial(scores_on_test, data=data, images=config.test_images),
            score_every=config.score_every,
            schedules=instrumentation.schedules(model, (x, y), labels),
            enter=lambda module, phase: set_dropout(module, phase.where, phase.factor),
        )
