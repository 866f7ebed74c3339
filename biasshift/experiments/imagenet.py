"""ImageNet, the 15-layer network of Figure 6, with pyramid pooling (section 4.4 of the paper).

Runs on any folder of images sorted into classes: a few classes of ImageNet make a small version of
it. The constants are the paper's; those that it leaves open are marked, with the reason for the
choice.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from biasshift.data import (
    CenterCrops,
    Crop,
    ImageNet,
    ImageStream,
    Scale,
    imagenet,
    mean_image,
    synthetic_imagenet,
)
from biasshift.distributed import rank, world_size
from biasshift.experiments.convnet_trial import (
    INIT,
    LAST_INIT,
    epoch_steps,
    momentum_sgd,
    phases_of,
)
from biasshift.experiments.experiment import POSITIVE, RANGES, Activation, Experiment, Range
from biasshift.nets import imagenet15
from biasshift.nets.convnets import IMAGENET15
from biasshift.nets.initialization import Init
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.trial import Instrumentation, Quantity, Trial

WEIGHT_DECAY = 5e-4
DROPOUT = 0.5
SIDE, CROP = 256, 224  # pixels; open: that they are in [0, 1] before the mean is subtracted
VALID_IMAGES = 5_000  # random ones, for the curves
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu")
SEEDS = 1
STEPS = 250_000  # open: the curves of Figure 6 end about there
# open: updates, share of the learning rate
SCHEDULE = ((100_000, 1.0), (100_000, 0.1), (50_000, 0.01))
LEARNING_RATE = 0.01  # open
BATCH_SIZE = 64  # open
MOMENTUM = 0.9  # open
# open: batch normalization is before the activation, as in Ioffe & Szegedy 2015
STRIDE = 2  # open: of the 6×6 layer; 4 costs a quarter
BINS = (1, 2, 4)  # open: of the three levels of the pyramid


@dataclass(frozen=True)
class ImagenetConfig:
    """One run on photographs, as its folder records it.

    Args:
        epochs: What so many steps are, on all training images.
        lr: The first learning rate.
        dropout: Rate in the two layers of 4096 units.
        stride: Of the 6×6 layer.
        crop: Pixels of a side of the images that the network sees.
        side: Pixels of a side of the images that they are cut from.
        last_init: Standard deviation of the last layer's initial weights; None: that of ``init``.
        subtracted: What is subtracted from the images: a mean per pixel or per channel.
        width: Multiplies the units of every hidden layer.
        score_every: Steps between two scores.
        valid_images: Random validation images that scores are taken on.
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
    dropout: float
    stride: int
    crop: int
    batch_norm: bool
    subtracted: Literal["pixel", "channel"]
    init: Init
    width: float
    score_every: int
    valid_images: int
    probe_size: int
    every: int
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float
    side: int = SIDE
    last_init: float | None = None


@dataclass(frozen=True)
class PreparedImages:
    """The images, and what is subtracted from them.

    Args:
        images: Folders of training and validation images.
        prepare: Bytes to numbers less the mean of the training images.
        device: Where minibatches go.
    """

    images: ImageNet
    prepare: Scale
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Imagenet(Experiment):
    """Train the paper's 15-layer network on ImageNet or any folder of images, instrumented."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds. Also elu:α, lrelu:slope, or
    any module by package.module:Class."""
    seeds: int = SEEDS
    """Runs per activation function."""
    steps: int = STEPS
    """Updates. The learning rate's schedule is shortened or stretched with them."""
    data: Path | None = None
    """Folder with train/ and val/; by default imagenet/ in $BIASSHIFT_DATA, else in ./data."""
    out: Path = Path("runs/imagenet")
    """Run folders are written below."""
    loaders: int = 4
    """Processes that decode images."""
    lr: float = LEARNING_RATE
    """Learning rate."""
    batch_size: int = BATCH_SIZE
    """Training examples per minibatch."""
    momentum: float = MOMENTUM
    """Momentum of gradient descent; 0 is none."""
    weight_decay: float = WEIGHT_DECAY
    """Weight decay, as in PyTorch's SGD."""
    dropout: float = DROPOUT
    """In the two layers of 4096 units."""
    stride: int = STRIDE
    """Of the 6×6 layer."""
    batch_norm: bool = False
    """Normalize every hidden layer before its activation."""
    mean: Literal["pixel", "channel"] = "pixel"
    """What is subtracted from images: the training mean of every pixel, or of every channel."""
    crop: int = CROP
    """Pixels of a side of the random crops, cut from images that are an eighth larger."""
    init: Init = INIT
    """Initial weights: normal or uniform of variance 2/fan_in (He et al. 2015), or normal of
    variance 1/fan_in (lecun) or 2/(fan_in + fan_out) (glorot)."""
    last_init: float | None = LAST_INIT
    """Standard deviation of the last layer's initial weights; None: as the other layers."""
    width: float = 1.0
    """Multiplies the units of every hidden layer: 0.25 is a version for a CPU."""
    score_every: int = 1_000
    """Updates between two measurements of the errors on validation images."""
    valid_images: int = VALID_IMAGES
    """Random validation images, the same for every run."""
    instrument: tuple[Quantity, ...] = ("activations", "bias_shift")
    """What is measured along the run, in every layer."""
    every: int = 5_000
    """Updates between two measurements."""
    probe: int = 64
    """Training examples that they are made on."""
    units: int = 2
    """Units of every layer in the unit Fisher matrices, whose labels are sampled."""
    damping: float = 1e-3
    """Damping of the measured unit Fisher matrices."""

    name: ClassVar[str] = "imagenet"
    ranges: ClassVar[dict[str, Range]] = RANGES | {"width": POSITIVE}
    presets: ClassVar = {
        "cpu": {  # half an hour of early learning, on a folder of some thousand images
            "width": 0.125,
            "crop": 112,
            "batch_size": 25,
            "lr": 0.002,
            "dropout": 0.0,
            "last_init": 0.01,
            "steps": 400,
            "seeds": 3,
            "loaders": 1,
            "score_every": 50,
            "valid_images": 500,
            "instrument": (),
        }
    }
    smoke_config: ClassVar[dict[str, Any]] = {
        "steps": 4,
        "epochs": 1.0,
        "batch_size": 6,
        "width": 0.01,
        "stride": 2,
        "crop": 112,
        "score_every": 2,
        "every": 2,
        "probe_size": 6,
        "valid_images": 6,
    }

    @property
    def _loaders(self) -> int:
        return 0 if self.smoke else self.loaders

    def check(self) -> None:
        """Refuses options that are out of their range, and crops that the network cannot take.

        Raises:
            ValueError: The message names the option and the remedy.
        """
        super().check()
        maps = -(-self.crop // self.stride)
        for _ in IMAGENET15:  # each stack ends with a pooling
            maps = -(-maps // 2)
        if maps < max(BINS):
            raise ValueError(
                f"--crop must leave at least {max(BINS)} pixels for the pyramid at --stride "
                f"{self.stride}, got {self.crop}. Give larger crops or a smaller stride."
            )

    @property
    def _side(self) -> int:
        return SIDE if self.smoke else self.crop * SIDE // CROP

    def load(self) -> PreparedImages:
        """Returns the images, checked, and their mean, which reads every training image once.

        Later calls find the mean in a cache beside the data.

        Raises:
            FileNotFoundError: The folders of images are not there.
            RuntimeError: The two splits differ in classes, or a file is not an image; the message
                names it.
        """
        images, root = self._images(), self.out if self.smoke else self.data
        mean = mean_image(images.train, self._side, self._loaders, root=root)
        mean = mean if self.mean == "pixel" else mean.mean((1, 2), keepdim=True)
        return PreparedImages(images, Scale(mean=mean.to(self.where())), self.where())

    def _images(self) -> ImageNet:
        if not self.smoke:
            return imagenet(self.data)
        folder = self.out / "synthetic-images"
        return imagenet(folder) if folder.exists() else synthetic_imagenet(folder)

    def grid(self) -> list[ImagenetConfig]:
        """Returns one config per seed and activation function; it reads the names of the images.

        The data set is recorded by its folder's name and its number of classes.
        """
        images = self._images()
        return [
            self._filled(
                ImagenetConfig,
                experiment=self.name,
                dataset=f"{images.name} ({images.classes} classes)",
                activation=activation,
                seed=seed,
                epochs=self.steps / epoch_steps(len(images.train), self.batch_size),
                side=self._side,
                subtracted=self.mean,
                probe_size=self.probe,
                quantities=self.instrument,
                units_measured=self.units,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]

    def trial(self, config: ImagenetConfig, data: PreparedImages) -> Trial:
        """Returns the network of a config, its minibatches and its measurements.

        Scores are of the middles of random validation images, and the probe is the middles of
        random training images: both are the same for every run.
        """
        train, valid, device = data.images.train, data.images.valid, data.device
        crop = Crop(config.side, config.crop)
        decoding: dict[str, Any] = {"prepare": data.prepare, "crop": crop, "device": device}
        shared: dict[str, Any] = {"workers": self._loaders, "rank": rank(), "world": world_size()}
        stream = ImageStream(train, config.batch_size, config.seed, **decoding, **shared)
        model = imagenet15(
            config.activation,
            config.seed,
            data.images.classes,
            config.stride,
            BINS,
            config.batch_norm,
            config.dropout,
            config.init,
            width=config.width,
            last_init=config.last_init,
        ).to(device)
        instrumentation = Instrumentation(
            config.quantities,
            every=config.every,
            examples=config.probe_size,
            units=config.units_measured,
            damping=config.damping,
            batch_size=16,
        )
        scored = valid.sample(min(config.valid_images, len(valid)))
        probed = train.sample(min(config.probe_size, len(train)))
        xs, ys = zip(*CenterCrops(probed, workers=0, **decoding), strict=True)
        return Trial(
            config,
            model,
            partial(momentum_sgd, momentum=config.momentum, decay=config.weight_decay),
            stream,
            config.steps,
            phases_of(SCHEDULE, config.steps, config.lr),
            score=partial(_scores, crops=CenterCrops(scored, 50, **decoding, **shared)),
            score_every=config.score_every,
            schedules=instrumentation.schedules(
                model, (torch.cat(xs), torch.cat(ys)), labels="sampled"
            ),
        )


def _scores(model: nn.Module, crops: CenterCrops) -> dict[str, float]:
    means = evaluate_batches(model, lambda: iter(crops), top=(1, 5))
    return {f"valid_{name}": value for name, value in means.items()}
