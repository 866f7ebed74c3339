"""One instrumented training run of a fully connected classifier: what the digits and the MNIST protocols share."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from biasshift.data import DataSet
from biasshift.examining import examine, residuals
from biasshift.instrument import instrument
from biasshift.logs import Log
from biasshift.nets import mlp
from biasshift.recording import Run
from biasshift.training import evaluate, train

if TYPE_CHECKING:
    import pandas as pd

Probe = tuple[torch.Tensor, torch.Tensor]

DATA_ORDER_SEED = 1000  # added to the seed: inputs and weights drawn from one seed would be correlated
LOOK_EVERY = 23  # steps, an epoch of the digits: within the 782 of MNIST's first epoch the losses of two networks part by far
LOOKED_AT = 5_000  # training examples, the first ones, on which the way down to the equal loss is followed


@dataclass(frozen=True)
class Setting:
    """One run. Runs with the same seed start from the same weights and see the same batches, whatever their activation."""

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
    exam_size: int  # training examples in each of the two disjoint probes of the examination at equal loss
    means_every: int  # epochs between measurements of activation means and bias shift
    fisher_every: int  # epochs between measurements of the unit Fisher matrices and the gradient gap
    equal_loss: float  # nats: the network is examined when its training loss, looked at every 23 steps, first gets here
    units_measured: int  # of every hidden layer, evenly spaced; the output layer is measured whole
    damping: float
    skip_input_layer: bool  # from the unit Fisher matrices: its incoming activations are the data, for every activation function


def run(setting: Setting, data: DataSet, folder: Path, exist: Literal["refuse", "replace"], on_epoch: Callable[[], None]) -> None:
    """Trains one network, measures it along the way, and examines it at the equal loss; the run folder is the result.

    Raises:
        FileExistsError: the folder holds a run already, and ``exist`` is "refuse".
        RuntimeError: training diverged.
    """
    inputs = data.x_train[0].numel()
    model = mlp(inputs, setting.width, setting.depth, data.classes, setting.activation, setting.seed, setting.init)
    model = model.to(data.x_train.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=setting.momentum)
    probe, exam_probes = probes(data, setting.probe_size, setting.exam_size)
    epoch_steps = -(-len(data.x_train) // data.views // setting.batch_size)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    measured = layers[setting.skip_input_layer :]
    units = {name: evenly_spaced(setting.width, setting.units_measured) for name in layers[:-1]}
    means = instrument(model, optimizer, probe, setting.means_every * epoch_steps, quantities=("activations", "bias_shift"))
    fishers = instrument(
        model, optimizer, probe, setting.fisher_every * epoch_steps,
        quantities=("fisher", "gap"), layers=measured, units=units, damping=setting.damping,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(DATA_ORDER_SEED + setting.seed)
    with Run.create(folder, asdict(setting), exist, device=data.x_train.device) as record, means, fishers:
        record.append(_layer_sizes(means))
        record.append(_scores(model, data, 0, 0))
        examined = False
        for step in train(model, optimizer, data, epochs=setting.epochs, batch_size=setting.batch_size, generator=generator):
            if not examined and step.number % LOOK_EVERY == 0 and (loss := _followed_loss(model, data)) <= setting.equal_loss:
                exam = examine(model, exam_probes, measured[1 - setting.skip_input_layer :], units, step.number)
                record.append(exam.assign(exam_loss=loss))
                examined = True
            if step.number % epoch_steps:
                continue
            record.append(_scores(model, data, step.number, step.epoch))
            if step.epoch % setting.means_every == 0:
                record.append(means.flush())
                record.append(fishers.flush())
                record.flush()
            on_epoch()
        record.append(means.flush())
        record.append(fishers.flush())
        record.append(residuals(model, probe, units, epoch_steps * setting.epochs))


def evenly_spaced(width: int, count: int) -> list[int]:
    """``count`` indices from 0 on, as far apart as they go; all of them where there are no more."""
    count = min(count, width)
    return [i * width // count for i in range(count)]


def _layer_sizes(log: Log) -> "pd.DataFrame":
    layers = log.layers.query("inputs > 0")
    return layers[["layer", "inputs"]].assign(step=0, unit=-1)


def probes(data: DataSet, size: int, exam_size: int) -> tuple[Probe, tuple[Probe, Probe]]:
    """A random part of the training population, and two disjoint ones for the examination: the same for every run."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0)).to(data.x_train.device)
    exam_size = min(exam_size, len(order) // 2)
    parts = (order[:size], order[:exam_size], order[exam_size : 2 * exam_size])
    along, first, second = ((data.x_train[part], data.y_train[part]) for part in parts)
    return along, (first, second)


def _followed_loss(model: nn.Module, data: DataSet) -> float:
    examples = min(len(data.x_train) // data.views, LOOKED_AT)
    return evaluate(model, data.x_train[:examples], data.y_train[:examples])[0]


def _scores(model: nn.Module, data: DataSet, step: int, epoch: int) -> "pd.DataFrame":
    """Losses and errors of the whole network in eval mode, on one view of every training example and on the validation set."""
    import pandas as pd

    examples = len(data.x_train) // data.views
    train_loss, train_error = evaluate(model, data.x_train[:examples], data.y_train[:examples])
    valid_loss, valid_error = evaluate(model, data.x_valid, data.y_valid)
    scores = {"train_loss": train_loss, "train_error": train_error, "valid_loss": valid_loss, "valid_error": valid_error}
    return pd.DataFrame([{"step": step, "epoch": float(epoch), **scores}])
