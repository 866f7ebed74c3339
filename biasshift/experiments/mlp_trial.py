"""The fully connected classifiers: what the digits and the MNIST protocols share."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from biasshift.data import DataSet
from biasshift.data.stream import TensorStream
from biasshift.distributed import rank, world_size
from biasshift.experiments.exam import examine, residuals
from biasshift.nets import mlp
from biasshift.optim import UnitNaturalGradient
from biasshift.training.evaluation import evaluate
from biasshift.training.trial import Exam, Phase, Probe, ProbeSchedule, Trial, evenly_spaced

Update = Literal["plain", "centered", "centered-p", "quasi-diagonal", "full"]
UPDATES: dict[str, dict[str, str]] = {  # name → what `biasshift.optim.UnitNaturalGradient` is told
    "plain": {"center": "none", "scale": "none"},
    "centered": {"center": "q", "scale": "none"},
    "centered-p": {"center": "p", "scale": "none"},
    "quasi-diagonal": {"center": "q", "scale": "diagonal"},
    "full": {"center": "q", "scale": "full"},
}
DECAY = 0.99  # of the running sums that the updates center and scale by
# steps, an epoch of the digits: within the 782 of MNIST's first epoch the losses of two networks
# part by far
LOOK_EVERY = 23
LOOKED_AT = (
    5_000  # training examples, the first ones, on which the way down to the equal loss is followed
)


@dataclass(frozen=True)
class Setting:
    """One run. Runs with the same seed start from the same weights and see the same batches,
    whatever their activation.
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
    probe_size: int  # training examples on which everything is measured along the run
    exam_size: (
        int  # training examples in each of the two disjoint probes of the examination at equal loss
    )
    means_every: int  # epochs between measurements of activation means and bias shift
    # epochs between measurements of the unit Fisher matrices and the gradient gap; 0: never
    fisher_every: int
    # nats: the network is examined when its training loss, looked at every 23 steps, first gets
    # here
    equal_loss: float
    units_measured: int  # of every hidden layer, evenly spaced; the output layer is measured whole
    damping: float
    # from the unit Fisher matrices: its incoming activations are the data, for every activation
    # function
    skip_input_layer: bool
    update: Update = "plain"
    constant: float = 0.0  # added to every activation; the next layer's biases could absorb it
    batch_norm: bool = False  # of every hidden layer, before its activation
    update_damping: float = 0.1  # λ of the updates that have a scale
    update_unit_damping: float = (
        1.0  # of their c, see `biasshift.optim.UnitNaturalGradient`, as the next
    )
    update_kl_clip: float = 1e-3
    # steps between two looks at the curvature of the full update; the others look at every step
    update_every: int = 20
    scores_per_epoch: int = 1
    scored: int = 0  # training examples that the training loss is measured on; 0: all
    examined: bool = (
        True  # whether there are an examination at the equal loss and residuals at the end
    )


def trial(setting: Setting, data: DataSet) -> Trial:
    """The network of a setting, its minibatches and its measurements."""
    inputs, device = data.x_train[0].numel(), data.x_train.device
    model = mlp(
        inputs, setting.width, setting.depth, data.classes, setting.activation, setting.seed, setting.init, setting.constant,
        setting.batch_norm,
    )  # fmt: skip
    stream = TensorStream(
        data.x_train, data.y_train, setting.batch_size, setting.seed, views=data.views, rank=rank(), world=world_size()
    )  # fmt: skip
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    measured = layers[setting.skip_input_layer :]
    units = {name: evenly_spaced(setting.width, setting.units_measured) for name in layers[:-1]}
    probe, exam_probes = probes(data, setting.probe_size, setting.exam_size)
    exam = Exam(
        LOOK_EVERY,
        setting.equal_loss,
        loss=partial(_followed_loss, data=data),
        examine=lambda model, step: examine(
            model, exam_probes, measured[1 - setting.skip_input_layer :], units, step
        ),
    )
    return Trial(
        setting,
        model.to(device),
        partial(_optimizer, setting),
        stream,
        steps=setting.epochs * len(stream),
        phases=(Phase(1, setting.lr),),
        score=partial(_scores, data=data, scored=setting.scored),
        score_every=max(1, len(stream) // setting.scores_per_epoch),
        schedules=_schedules(setting, probe, len(stream), measured, units),
        exam=exam if setting.examined else None,
        closing=(lambda model, step: residuals(model, probe, units, step))
        if setting.examined
        else None,
    )


def _schedules(
    setting: Setting,
    probe: Probe,
    epoch_steps: int,
    measured: list[str],
    units: dict[str, list[int]],
) -> list[ProbeSchedule]:
    schedules = [
        ProbeSchedule(probe, setting.means_every * epoch_steps, ("activations", "bias_shift"))
    ]
    if setting.fisher_every:
        options = {"layers": measured, "units": units, "damping": setting.damping}
        schedules.append(
            ProbeSchedule(probe, setting.fisher_every * epoch_steps, ("fisher", "gap"), options)
        )
    return schedules


def _optimizer(
    setting: Setting, model: nn.Module, parameters: Iterator[nn.Parameter]
) -> torch.optim.Optimizer:
    if (
        setting.update == "plain"
    ):  # the same steps as the family's plain member, without its looks at the forward passes
        return torch.optim.SGD(parameters, lr=setting.lr, momentum=setting.momentum)
    kind, scaled = UPDATES[setting.update], UPDATES[setting.update]["scale"] != "none"
    return UnitNaturalGradient(
        model, setting.lr, kind["center"], kind["scale"], setting.momentum, damping=setting.update_damping, decay=DECAY,
        update_every=setting.update_every if setting.update == "full" else 1,
        kl_clip=setting.update_kl_clip if scaled else None,
        unit_damping=setting.update_unit_damping if scaled else 0.0,
        generator=torch.Generator(next(model.parameters()).device).manual_seed(setting.seed + 1_000_003 * rank()),
    )  # fmt: skip


def probes(data: DataSet, size: int, exam_size: int) -> tuple[Probe, tuple[Probe, Probe]]:
    """A random part of the training population, and two disjoint ones for the examination: the same
    for every run.
    """
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0)).to(
        data.x_train.device
    )
    exam_size = min(exam_size, len(order) // 2)
    parts = (order[:size], order[:exam_size], order[exam_size : 2 * exam_size])
    along, first, second = ((data.x_train[part], data.y_train[part]) for part in parts)
    return along, (first, second)


def _followed_loss(model: nn.Module, data: DataSet) -> float:
    examples = min(len(data.x_train) // data.views, LOOKED_AT)
    return evaluate(model, data.x_train[:examples], data.y_train[:examples])[0]


def _scores(model: nn.Module, data: DataSet, scored: int) -> dict[str, float]:
    """Losses and errors of the whole network in eval mode, on one view of every training example
    and on the validation set.
    """
    examples = min(len(data.x_train) // data.views, scored or len(data.x_train))
    train_loss, train_error = evaluate(model, data.x_train[:examples], data.y_train[:examples])
    valid_loss, valid_error = evaluate(model, data.x_valid, data.y_valid)
    return {
        "train_loss": train_loss,
        "train_error": train_error,
        "valid_loss": valid_loss,
        "valid_error": valid_error,
    }
