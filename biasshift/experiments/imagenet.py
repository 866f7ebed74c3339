"""ImageNet, the 15-layer network with spatial pyramid pooling: the experiment of Figure 6 (section
4.4 of the paper).

The constants are the paper's; those that it leaves open are marked, with the reason for the choice.
Runs on any folder of images sorted into classes: a few classes of ImageNet make a small version of
it.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

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
from biasshift.experiments.convnet_trial import epoch_steps, momentum_sgd, schedule
from biasshift.experiments.experiment import (
    Activation,
    Experiment,
    at_least_one,
    distinct,
    not_negative,
    positive,
    shares,
)
from biasshift.nets import imagenet15
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.trial import Instrumentation, Quantity, Trial

WEIGHT_DECAY = 5e-4
DROPOUT = 0.5
SIDE, CROP = 256, 224
VALID_IMAGES = 5_000  # random ones, for the curves
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu")
SEEDS = 1
STEPS = 250_000  # open: the curves of Figure 6 end about there
SCHEDULE = (
    (100_000, 1.0),
    (100_000, 0.1),
    (50_000, 0.01),
)  # open: updates, share of the learning rate
LEARNING_RATE = 0.01  # open
BATCH_SIZE = 64  # open
MOMENTUM = 0.9  # open
STRIDE = 2  # open: of the 6×6 layer; 4 costs a quarter
BINS = (1, 2, 4)  # open: of the three levels of the pyramid


@dataclass(frozen=True)
class Setting:
    """One run."""

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
    init: Literal["normal", "uniform"]
    width: float
    score_every: int
    valid_images: int
    probe_size: int
    every: int
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float


@dataclass(frozen=True)
class Loaded:
    """The images, and what is subtracted from them."""

    images: ImageNet
    prepare: Scale
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Imagenet(Experiment):
    """Train the paper's 15-layer network on ImageNet or any folder of images, instrumented."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds."""
    seeds: int = SEEDS
    steps: int = STEPS
    """Updates. The learning rate's schedule is shortened or stretched with them."""
    data: Path | None = None
    """Folder that holds train/ and val/ with a folder per class. Default: imagenet/ in
    $BIASSHIFT_DATA, else in ./data.
    """
    out: Path = Path("runs/imagenet")
    """Run folders are written below."""
    loaders: int = 4
    """Processes that decode images."""
    lr: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    weight_decay: float = WEIGHT_DECAY
    dropout: float = DROPOUT
    """In the two layers of 4096 units."""
    stride: int = STRIDE
    """Of the 6×6 layer."""
    batch_norm: bool = False
    mean: Literal["pixel", "channel"] = "pixel"
    """What is subtracted from the images: the training images' mean at every pixel, or of every
    channel.
    """
    init: Literal["normal", "uniform"] = "normal"
    width: float = 1.0
    """Multiplies the units of every hidden layer: 0.25 is a version for a CPU."""
    score_every: int = 1_000
    """Updates between two looks at the errors on validation images."""
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

    name: ClassVar[str] = "imagenet"

    def load(self) -> Loaded:
        """The folders, checked, and the mean image, which takes a look at every training image
        once.
        """
        images = self._images()
        mean = mean_image(
            images.train,
            SIDE,
            0 if self.smoke else self.loaders,
            root=self.out if self.smoke else self.data,
        )
        mean = mean if self.mean == "pixel" else mean.mean((1, 2), keepdim=True)
        return Loaded(images, Scale(mean=mean.to(self.where())), self.where())

    def _images(self) -> ImageNet:
        if not self.smoke:
            return imagenet(self.data)
        folder = self.out / "synthetic-images"
        return imagenet(folder) if folder.exists() else synthetic_imagenet(folder)

    def settings(self) -> list[Setting]:
        """One per run."""
        self._check()
        images = self._images()
        found = [
            Setting(
                self.name, f"{images.name} ({images.classes} "
                           "classes)", activation, seed, self.steps,
                self.steps / epoch_steps(len(images.train), self.batch_size), self.batch_size, self.lr, self.momentum, self.weight_decay,
                self.dropout, self.stride, CROP, self.batch_norm, self.mean, self.init, self.width, self.score_every, self.valid_images,
                self.probe, self.every, self.instrument, self.units, self.damping,
            )
            for seed in range(self.seeds)
            for activation in self.activation
        ]  # fmt: skip
        small = {
            "steps": 4,
            "epochs": 1.0,
            "batch_size": 6,
            "width": 0.01,
            "stride": 2,
            "crop": 112,
            "score_every": 2,
            "every": 2,
        }
        return (
            [replace(s, **small, probe_size=6, valid_images=6) for s in found if s.seed < 1]
            if self.smoke
            else found
        )

    def trial(self, setting: Setting, data: Loaded) -> Trial:
        """The network of a setting, and what is measured of it."""
        return _trial(setting, data, 0 if self.smoke else self.loaders)

    def _check(self) -> None:
        self.check()
        at_least_one(
            self,
            "seeds",
            "steps",
            "batch_size",
            "stride",
            "score_every",
            "valid_images",
            "every",
            "probe",
            "units",
        )
        positive(self, "lr", "width")
        shares(self, "momentum", "dropout")
        not_negative(self, "weight_decay", "damping", "loaders")
        distinct("activation", self.activation)


def _trial(setting: Setting, data: Loaded, loaders: int) -> Trial:
    crop = Crop(SIDE, setting.crop)
    stream = ImageStream(
        data.images.train, setting.batch_size, setting.seed, prepare=data.prepare, crop=crop, workers=loaders, device=data.device,
        rank=rank(), world=world_size(),
    )  # fmt: skip
    model = imagenet15(
        setting.activation, setting.seed, data.images.classes, setting.stride, BINS, setting.batch_norm, setting.dropout, setting.init,
        width=setting.width,
    )  # fmt: skip
    instrumentation = Instrumentation(
        setting.quantities,
        setting.every,
        setting.probe_size,
        setting.units_measured,
        setting.damping,
        16,
    )
    return Trial(
        setting,
        model.to(data.device),
        partial(momentum_sgd, momentum=setting.momentum, decay=setting.weight_decay),
        stream,
        setting.steps,
        schedule(SCHEDULE, setting.steps, setting.lr),
        score=partial(_scores, crops=_crops(setting, data, crop, loaders)),
        score_every=setting.score_every,
        schedules=instrumentation.schedules(model, _probe(setting, data, crop), labels="sampled"),
    )


def _crops(setting: Setting, data: Loaded, crop: Crop, loaders: int) -> CenterCrops:
    valid = data.images.valid
    some = valid.sample(min(setting.valid_images, len(valid)))
    return CenterCrops(
        some,
        50,
        prepare=data.prepare,
        crop=crop,
        workers=loaders,
        device=data.device,
        rank=rank(),
        world=world_size(),
    )


def _probe(setting: Setting, data: Loaded, crop: Crop) -> tuple[Tensor, Tensor]:
    """The middles of random training images, the same for every run."""
    some = data.images.train.sample(min(setting.probe_size, len(data.images.train)))
    xs, ys = zip(
        *CenterCrops(some, prepare=data.prepare, crop=crop, workers=0, device=data.device),
        strict=True,
    )
    return torch.cat(xs), torch.cat(ys)


def _scores(model: nn.Module, crops: CenterCrops) -> dict[str, float]:
    found = evaluate_batches(model, lambda: iter(crops), top=(1, 5))
    return {f"valid_{name}": value for name, value in found.items()}
