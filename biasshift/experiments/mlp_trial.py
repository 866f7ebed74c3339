"""The fully connected classifiers: what the demo, MNIST and the sweep record, train and measure."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from biasshift.data import DataSet
from biasshift.data.stream import TensorStream
from biasshift.distributed import rank, world_size
from biasshift.experiments.experiment import Experiment
from biasshift.nets import mlp
from biasshift.optim import UnitNaturalGradient
from biasshift.training.evaluation import evaluate
from biasshift.training.trial import Exam, Phase, Probe, ProbeSchedule, Trial, evenly_spaced

Update = Literal["plain", "centered", "centered-p", "quasi-diagonal", "full"]
UPDATES: dict[str, dict[str, str]] = {  # name → options of `biasshift.optim.UnitNaturalGradient`
    "plain": {"center": "none", "scale": "none"},
    "centered": {"center": "q", "scale": "none"},
    "centered-p": {"center": "p", "scale": "none"},
    "quasi-diagonal": {"center": "q", "scale": "diagonal"},
    "full": {"center": "q", "scale": "full"},
}
DECAY = 0.99  # of the running sums that the updates center and scale by
# Steps between two evaluations of the loss before the examination, an epoch of the digits: within
# the 782 of MNIST's first epoch the losses of two networks part by far.
EXAM_EVERY = 23
EXAM_IMAGES = 5_000  # training examples, the first ones, that this loss is the mean over
SMOKE: dict[str, Any] = {"epochs": 2, "depth": 2, "width": 12, "means_every": 1, "fisher_every": 2}


@dataclass(frozen=True)
class MlpConfig:
    """One run of a fully connected network, as its folder records it.

    Runs with the same seed start from the same weights and see the same minibatches, whatever
    their activation.

    Args:
        depth: Hidden layers.
        width: Units of each.
        probe_size: Training examples on which everything is measured along the run.
        exam_size: Training examples in each of the two disjoint probes of the examination.
        means_every: Epochs between measurements of activation means and bias shift.
        fisher_every: Epochs between measurements of unit Fisher matrices and gradient gap; 0:
            never.
        equal_loss: Training loss (nats) at which the network is examined, as soon as it gets
            there; it is evaluated every 23 steps.
        units_measured: Of every hidden layer, evenly spaced; the output layer is measured whole.
        damping: Of the unit Fisher matrices that are measured.
        skip_input_layer: Leave it out of the unit Fisher matrices: its incoming activations are
            the data, for every activation function.
        constant: Added to every activation; the next layer's biases could absorb it.
        batch_norm: Of every hidden layer, before its activation.
        update_damping: λ of the updates that have a scale.
        update_unit_damping: Of their c, see `biasshift.optim.UnitNaturalGradient`.
        update_kl_clip: Their trust region, see there.
        update_every: Steps between two measurements of the curvature by the full update; the
            others measure it at every step.
        scored: Training examples that the training loss is measured on; 0: all.
        examined: Whether there are an examination at the equal loss and residuals at the end.
    """

    experiment: str
    activation: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    depth: int
    width: int
    init: Literal["normal", "uniform"]
    probe_size: int
    exam_size: int
    means_every: int
    fisher_every: int
    equal_loss: float
    units_measured: int
    damping: float
    skip_input_layer: bool
    update: Update = "plain"
    constant: float = 0.0
    batch_norm: bool = False
    update_damping: float = 0.1
    update_unit_damping: float = 1.0
    update_kl_clip: float = 1e-3
    update_every: int = 20
    scores_per_epoch: int = 1
    scored: int = 0
    examined: bool = True


@dataclass(frozen=True, kw_only=True)
class MlpExperiment(Experiment):
    """An experiment of `MlpConfig`s: small networks, which train side by side on several cores."""

    small: ClassVar[bool] = True

    def trial(self, config: MlpConfig, data: DataSet) -> Trial:
        """Returns the network of a config, its minibatches and its measurements, see `trial`."""
        return trial(config, data)


def trial(config: MlpConfig, data: DataSet) -> Trial:
    """Returns the network of a config, its minibatches and its measurements.

    Along the run, activation means and bias shifts are measured on one probe, and unit Fisher
    matrices and gradient gaps less often. At the equal loss the network is examined on two further
    probes; at the end the exact identities are tested in float64.

    Args:
        config: One run.
        data: Flattened images; the network is put on their device.
    """
    # Here: both make tables, and pandas would slow the help of every command.
    from biasshift.experiments.exam import examine, residuals

    model = mlp(
        data.x_train[0].numel(),
        config.width,
        config.depth,
        data.classes,
        config.activation,
        config.seed,
        config.init,
        config.constant,
        config.batch_norm,
    ).to(data.x_train.device)
    stream = TensorStream(
        data.x_train,
        data.y_train,
        config.batch_size,
        config.seed,
        views=data.views,
        rank=rank(),
        world=world_size(),
    )
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    measured = layers[config.skip_input_layer :]
    units = {name: evenly_spaced(config.width, config.units_measured) for name in layers[:-1]}
    probe, exam_probes = probes(data, config.probe_size, config.exam_size)
    every = config.means_every * len(stream)
    schedules = [ProbeSchedule(probe, every, ("activations", "bias_shift"))]
    if config.fisher_every:
        every = config.fisher_every * len(stream)
        options = {"layers": measured, "units": units, "damping": config.damping}
        schedules.append(ProbeSchedule(probe, every, ("fisher", "gap"), options))
    exam = Exam(
        EXAM_EVERY,
        config.equal_loss,
        loss=lambda model: _train_score(model, data, EXAM_IMAGES)[0],
        examine=lambda model, step: examine(
            model, exam_probes, measured[1 - config.skip_input_layer :], units, step
        ),
    )
    return Trial(
        config,
        model,
        partial(_optimizer, config),
        stream,
        steps=config.epochs * len(stream),
        phases=(Phase(1, config.lr),),
        score=partial(_scores, data=data, images=config.scored or len(data.x_train)),
        score_every=max(1, len(stream) // config.scores_per_epoch),
        schedules=schedules,
        exam=exam if config.examined else None,
        at_end=(lambda model, step: residuals(model, probe, units, step))
        if config.examined
        else None,
    )


def _optimizer(
    config: MlpConfig, model: nn.Module, parameters: Iterator[nn.Parameter]
) -> torch.optim.Optimizer:
    # The same steps as the family's plain member, without its hooks on the forward passes.
    if config.update == "plain":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)
    kind = UPDATES[config.update]
    scaled = kind["scale"] != "none"
    device = next(model.parameters()).device
    return UnitNaturalGradient(
        model,
        config.lr,
        kind["center"],
        kind["scale"],
        config.momentum,
        damping=config.update_damping,
        decay=DECAY,
        update_every=config.update_every if config.update == "full" else 1,
        kl_clip=config.update_kl_clip if scaled else None,
        unit_damping=config.update_unit_damping if scaled else 0.0,
        generator=torch.Generator(device).manual_seed(config.seed + 1_000_003 * rank()),
    )


def probes(data: DataSet, size: int, exam_size: int) -> tuple[Probe, tuple[Probe, Probe]]:
    """Returns the probe along a run, and the two disjoint ones of its examination.

    They are random parts of the training set, the same for every run. Where the set is too small
    for two of ``exam_size``, each of the two is half of it.

    Args:
        data: The set that they are taken from.
        size: Examples in the first, at most.
        exam_size: Examples in each of the other two, at most.
    """
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0)).to(
        data.x_train.device
    )
    exam_size = min(exam_size, len(order) // 2)
    parts = (order[:size], order[:exam_size], order[exam_size : 2 * exam_size])
    along, first, second = ((data.x_train[part], data.y_train[part]) for part in parts)
    return along, (first, second)


def _train_score(model: nn.Module, data: DataSet, images: int) -> tuple[float, float]:
    """Loss and error on the first training images, one view of each."""
    images = min(len(data.x_train) // data.views, images)
    return evaluate(model, data.x_train[:images], data.y_train[:images])


def _scores(model: nn.Module, data: DataSet, images: int) -> dict[str, float]:
    """Losses and errors of the whole network, on training images and on the validation set."""
    train, valid = _train_score(model, data, images), evaluate(model, data.x_valid, data.y_valid)
    names = ("train_loss", "train_error", "valid_loss", "valid_error")
    return dict(zip(names, train + valid, strict=True))
