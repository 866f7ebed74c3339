"""The MNIST autoencoders of Figure 3 (section 4.1 of the paper).

Their layers have 784-1000-500-250-30-250-500-1000-784 units. The constants are the paper's; those
that it leaves open are marked, with the reason for the choice.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.activations import folder_part
from biasshift.data import DataSet, TensorStream, mnist, synthetic_mnist
from biasshift.distributed import rank, world_size
from biasshift.experiments.experiment import Activation, Experiment
from biasshift.nets import autoencoder
from biasshift.training.evaluation import evaluate_batches, process_share
from biasshift.training.step import Loss
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
INIT = "normal"  # open: He et al. 2015, as for the classifiers


@dataclass(frozen=True)
class AutoencoderConfig:
    """One run of an autoencoder, as its folder records it.

    Args:
        loss: Of the logistic outputs: see `LOSSES`.
        code: Whether the layer of 30 units is linear or has the activation function.
        width: Multiplies the units of every hidden layer.
        probe_size: Training examples on which everything is measured along the run.
        every: Epochs between two measurements.
        units_measured: Of every layer, evenly spaced, in the unit Fisher matrices.
    """

    experiment: str
    activation: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    loss: Literal["cross-entropy", "squared"]
    code: Literal["linear", "activation"]
    init: Literal["normal", "uniform"]
    width: float
    probe_size: int
    every: int
    quantities: tuple[Quantity, ...]
    units_measured: int
    damping: float


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Experiment):
    """Train the paper's MNIST autoencoders, at four learning rates."""

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all seeds and learning rates. Also elu:α, lrelu:slope, or
    any module by package.module:Class."""
    seeds: int = SEEDS
    """Runs per activation function and learning rate."""
    epochs: int = EPOCHS
    """Passes over the training data."""
    lr: tuple[float, ...] = LEARNING_RATES
    """Learning rates; each activation function gets all of them."""
    data: Path | None = None
    """Folder with MNIST/raw; by default $BIASSHIFT_DATA, else ./data. Downloaded if missing."""
    out: Path = Path("runs/autoencoder")
    """Run folders are written below."""
    batch_size: int = BATCH_SIZE
    """Training examples per minibatch."""
    momentum: float = MOMENTUM
    """Momentum of gradient descent; 0 is none."""
    loss: Literal["cross-entropy", "squared"] = LOSS
    """Loss of the logistic outputs, summed over pixels. Recorded errors are squared means."""
    code: Literal["linear", "activation"] = CODE
    """Output of the code layer: linear, or through the activation function."""
    init: Literal["normal", "uniform"] = INIT
    """Distribution of the initial weights."""
    instrument: tuple[Quantity, ...] = ("activations", "bias_shift")
    """What is measured along the run, in every layer."""
    every: int = 1
    """Epochs between two measurements."""
    probe: int = 2_000
    """Training examples that it is measured on."""
    # Bernoulli pixels: labels are sampled, for 784 outputs would take 784 backward passes.
    units: int = 8
    """Units of every layer in the unit Fisher matrices."""
    damping: float = 1e-3
    """Damping of the measured unit Fisher matrices."""

    name: ClassVar[str] = "autoencoder"
    small: ClassVar[bool] = True
    presets: ClassVar = {"cpu": {"epochs": 20, "seeds": 3}}  # an hour or two of two cores
    smoke_config: ClassVar[dict[str, Any]] = {"epochs": 2, "width": 0.02, "probe_size": 100}

    def load(self) -> DataSet:
        """Returns MNIST, checked, on the device; synthetic images of its shape for a smoke test.

        Raises:
            FileNotFoundError: Files are missing, and downloading them failed.
            RuntimeError: A file is damaged, or is not what its name says.
        """
        return (synthetic_mnist() if self.smoke else mnist(self.data)).to(self.where())

    def grid(self) -> list[AutoencoderConfig]:
        """Returns one config per seed, learning rate and activation function.

        Every learning rate is fixed over the run: the paper compares four of them, for every
        activation function, over 500 epochs.
        """
        return [
            self._filled(
                AutoencoderConfig,
                experiment=self.name,
                activation=activation,
                seed=seed,
                lr=lr,
                width=1.0,
                probe_size=self.probe,
                quantities=self.instrument,
                units_measured=self.units,
            )
            for seed in range(self.seeds)
            for lr in self.lr
            for activation in self.activation
        ]

    def folder(self, config: AutoencoderConfig) -> Path:
        """Returns the run folder of a config, named by activation, learning rate and seed."""
        return self.out / f"{folder_part(config.activation)}-lr{config.lr:g}-{config.seed}"

    def trial(self, config: AutoencoderConfig, data: DataSet) -> Trial:
        """Returns the network of a config, whose labels are its images, and its measurements.

        The loss is summed over pixels and averaged over images. Losses and reconstruction errors
        of all images are recorded once an epoch.
        """
        images, loss = data.x_train, LOSSES[config.loss]
        model = autoencoder(
            config.activation, config.seed, config.init, code=config.code, width=config.width
        ).to(images.device)
        stream = TensorStream(
            images, images, config.batch_size, config.seed, rank=rank(), world=world_size()
        )
        instrumentation = Instrumentation(
            config.quantities,
            every=config.every * len(stream),
            examples=config.probe_size,
            units=config.units_measured,
            damping=config.damping,
            batch_size=1000,
        )
        return Trial(
            config,
            model,
            lambda model, parameters: torch.optim.SGD(
                parameters, lr=config.lr, momentum=config.momentum
            ),
            stream,
            steps=config.epochs * len(stream),
            phases=(Phase(1, config.lr),),
            score=partial(_scores, data=data, loss=loss),
            score_every=len(stream),
            schedules=instrumentation.schedules(
                model, (images, images), labels="sampled", likelihood="bernoulli"
            ),
            loss=lambda outputs, x: loss(outputs, x).mean(),
        )


def _cross_entropy(outputs: Tensor, x: Tensor) -> Tensor:
    """In nats, per image."""
    return F.binary_cross_entropy_with_logits(outputs, x, reduction="none").sum(1)


def _squared(outputs: Tensor, x: Tensor) -> Tensor:
    """Half the squared distance of the reconstruction, per image."""
    return (outputs.sigmoid() - x).square().sum(1) / 2


LOSSES: dict[str, Loss] = {"cross-entropy": _cross_entropy, "squared": _squared}


def _scores(model: nn.Module, data: DataSet, loss: Loss) -> dict[str, float]:
    """The loss, and the mean squared error of a pixel, on training, validation and test images."""
    scores = {}
    functions = {"loss": loss, "error": lambda outputs, x: 2 * _squared(outputs, x) / x.shape[1]}
    for split, x in (("train", data.x_train), ("valid", data.x_valid), ("test", data.x_test)):
        batches = [(part, part) for part in process_share(x).split(1000)]
        for name, function in functions.items():
            means = evaluate_batches(model, lambda batches=batches: iter(batches), (), function)
            scores[f"{split}_{name}"] = means["loss"]
    return scores
