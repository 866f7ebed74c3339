"""The MNIST autoencoder 784-1000-500-250-30-250-500-1000-784: the experiment of Figure 3 (section
4.1 of the paper).

The constants are the paper's; those that it leaves open are marked, with the reason for the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.data import DataSet, TensorStream, mnist, synthetic_mnist
from biasshift.distributed import rank, world_size
from biasshift.experiments.convnet_trial import share
from biasshift.experiments.experiment import (
    Activation,
    Experiment,
    at_least_one,
    distinct,
    not_negative,
    positive,
    shares,
)
from biasshift.nets import autoencoder
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.trial import Instrumentation, Phase, Quantity, Trial

BATCH_SIZE = 64
EPOCHS = 500
LEARNING_RATES = (1e-2, 1e-3, 1e-4, 1e-5)  # fixed, and compared
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu", "srelu")
SEEDS = 5  # open: "medians over several runs"
MOMENTUM = 0.0  # open: the paper names none for this experiment
# Open. Half the squared error, summed over pixels: with it the paper's learning rates span from too
# small to large, as in its figure.
# The cross-entropy of Martens 2010, summed over pixels, diverges at 1e-2.
LOSS = "squared"
CODE = "linear"  # open: Martens 2010


@dataclass(frozen=True)
class Setting:
    """One run."""

    experiment: str
    activation: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    loss: str
    code: str
    init: str
    width: float
    probe_size: int
    every: int
    quantities: tuple[str, ...]
    units_measured: int
    damping: float


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Experiment):
    """Train the paper's MNIST autoencoders, at four learning rates."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds and learning rates."""
    seeds: int = SEEDS
    epochs: int = EPOCHS
    lr: tuple[float, ...] = LEARNING_RATES
    data: Path | None = None
    """Folder that holds MNIST/raw. Default: $BIASSHIFT_DATA, else ./data; downloaded where it is
    missing.
    """
    out: Path = Path("runs/autoencoder")
    """Run folders are written below."""
    batch_size: int = BATCH_SIZE
    momentum: float = MOMENTUM
    loss: Literal["cross-entropy", "squared"] = LOSS
    """Of the logistic outputs, summed over pixels. The errors recorded are squared, means over
    pixels, whatever this is.
    """
    code: Literal["linear", "activation"] = CODE
    init: Literal["normal", "uniform"] = "normal"
    instrument: tuple[Quantity, ...] = ("activations", "bias_shift")
    """What is measured along the run, in every layer."""
    every: int = 1
    """Epochs between two measurements."""
    probe: int = 2_000
    """Training examples that it is measured on."""
    units: int = 8
    """Units of every layer in the unit Fisher matrices: those of Bernoulli pixels, whose labels are
    sampled, for 784 outputs would take 784 backward passes.
    """
    damping: float = 1e-3

    name: ClassVar[str] = "autoencoder"
    small: ClassVar[bool] = True

    def load(self) -> DataSet:
        """MNIST, checked."""
        return (synthetic_mnist() if self.smoke else mnist(self.data)).to(self.where())

    def settings(self) -> list[Setting]:
        """One per activation, learning rate and seed."""
        self.check()
        at_least_one(self, "seeds", "epochs", "batch_size", "probe", "every", "units")
        shares(self, "momentum")
        not_negative(self, "damping")
        distinct("activation", self.activation)
        distinct("lr", self.lr)
        for lr in self.lr:
            positive(SimpleNamespace(lr=lr), "lr")
        found = [
            Setting(
                self.name, activation, seed, self.epochs, self.batch_size, lr, self.momentum, self.loss, self.code, self.init, 1.0,
                self.probe, self.every, self.instrument, self.units, self.damping,
            )
            for seed in range(self.seeds)
            for lr in self.lr
            for activation in self.activation
        ]  # fmt: skip
        return (
            [replace(s, epochs=2, width=0.02, probe_size=100) for s in found if s.seed < 1]
            if self.smoke
            else found
        )

    def folder(self, setting: Setting) -> Path:
        """The folder of a run."""
        return self.out / f"{setting.activation}-lr{setting.lr:g}-{setting.seed}"

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        return _trial(setting, data)


def _trial(setting: Setting, data: DataSet) -> Trial:
    code: Literal["linear", "activation"] = "linear" if setting.code == "linear" else "activation"
    init: Literal["normal", "uniform"] = "normal" if setting.init == "normal" else "uniform"
    model = autoencoder(setting.activation, setting.seed, init, code=code, width=setting.width).to(
        data.x_train.device
    )
    stream = TensorStream(
        data.x_train,
        data.x_train,
        setting.batch_size,
        setting.seed,
        rank=rank(),
        world=world_size(),
    )
    quantities: tuple[Quantity, ...] = setting.quantities  # pyright: ignore[reportAssignmentType]
    instrumentation = Instrumentation(
        quantities,
        setting.every * len(stream),
        setting.probe_size,
        setting.units_measured,
        setting.damping,
        1000,
    )
    probe = data.x_train[: setting.probe_size], data.x_train[: setting.probe_size]
    return Trial(
        setting,
        model,
        partial(_optimizer, setting),
        stream,
        steps=setting.epochs * len(stream),
        phases=(Phase(1, setting.lr),),
        score=partial(_scores, data=data, loss=LOSSES[setting.loss]),
        score_every=len(stream),
        schedules=instrumentation.schedules(model, probe, labels="sampled", likelihood="bernoulli"),
        loss=lambda outputs, x: LOSSES[setting.loss](outputs, x).mean(),
    )


def _optimizer(
    setting: Setting, model: nn.Module, parameters: Iterator[nn.Parameter]
) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=setting.lr, momentum=setting.momentum)


def cross_entropy(outputs: Tensor, x: Tensor) -> Tensor:
    """In nats, per image."""
    return F.binary_cross_entropy_with_logits(outputs, x, reduction="none").sum(1)


def squared(outputs: Tensor, x: Tensor) -> Tensor:
    """Half the squared distance of the reconstruction, per image."""
    return (outputs.sigmoid() - x).square().sum(1) / 2


LOSSES = {"cross-entropy": cross_entropy, "squared": squared}


def _scores(model: nn.Module, data: DataSet, loss) -> dict[str, float]:
    """The loss, and the reconstruction error: the mean squared error of a pixel; on the training,
    validation and test images.
    """
    found = {}
    for name, x in (("train", data.x_train), ("valid", data.x_valid), ("test", data.x_test)):
        own, _ = share(x, x)
        for kind, function in (
            ("loss", loss),
            ("error", lambda outputs, x: 2 * squared(outputs, x) / x.shape[1]),
        ):
            batches = lambda own=own: ((part, part) for part in own.split(1000))  # noqa: E731
            found[f"{name}_{kind}"] = evaluate_batches(model, batches, top=(), loss=function)[
                "loss"
            ]
    return found
