"""Is it causal? Networks trained by updates that take the bias shift out, beside those that do not.

The paper argues that mean activations near zero help because they bring the gradient nearer to the
unit natural gradient. If that is the reason, then an update that centers incoming activations
should help ReLU networks more than ELU networks, and close the gap between them; and a constant
added to ELU's activations should slow gradient descent and not the centered update.

Every cell (activation × update × constant × batch normalization) is trained at the same learning
rates with the same seeds: nothing is tuned for one of them. The images are MNIST's, averaged over
2×2 pixels: the input layer's blocks of the full update are then sixteen times smaller.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor

from biasshift.analysis.grid import Cell
from biasshift.data import DataSet, mnist, synthetic_mnist
from biasshift.experiments.experiment import (
    Activation,
    Experiment,
    at_least_one,
    distinct,
    not_negative,
    positive,
)
from biasshift.experiments.mlp_trial import Setting, Update, trial
from biasshift.training.trial import Trial

ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu", "srelu")
UPDATES: tuple[Update, ...] = ("plain", "centered", "quasi-diagonal", "full")
LEARNING_RATES = (
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
)  # around the paper's, from where all are slow to where most diverge
CONSTANT = 0.5  # about what separates ReLU's mean activation from ELU's
CONSTANT_UPDATES: tuple[Update, ...] = ("plain", "centered")
NORMED: tuple[Activation, ...] = (
    "elu",
    "relu",
)  # with batch normalization, too, by plain gradient descent
SEEDS = 6  # fewer cannot carry a paired test
EPOCHS = 1
DEPTH, WIDTH, BATCH_SIZE = 8, 128, 64  # those of Figure 2


@dataclass(frozen=True, kw_only=True)
class Sweep(Experiment):
    """Train activations × updates × learning rates × seeds on MNIST, for the causal claims;
    resumable, and in parts.
    """

    activation: tuple[Activation, ...] = ACTIVATIONS
    update: tuple[Update, ...] = UPDATES
    """plain (gradient descent), centered and centered-p (bias shift taken out), quasi-diagonal,
    full (unit natural gradient).
    """
    lr: tuple[float, ...] = LEARNING_RATES
    """Learning rates; every cell gets all of them."""
    constant: float = CONSTANT
    """Added to ELU's activations in further runs, plain and centered. 0: no such runs."""
    batch_norm: bool = True
    """Further plain runs of the ELU and ReLU networks, with batch normalization."""
    seeds: int = SEEDS
    epochs: int = EPOCHS
    depth: int = DEPTH
    width: int = WIDTH
    data: Path | None = None
    """Folder that holds MNIST/raw. Default: $BIASSHIFT_DATA, else ./data; downloaded where it is
    missing.
    """
    out: Path = Path("runs/sweep")
    """Run folders are written below."""
    resume: bool = True
    """Skip the runs that are done, and go on with those that are not."""
    part: tuple[int, int] = (1, 1)
    """The runs of one job out of several, such as 3 of 16: --part $SLURM_ARRAY_TASK_ID 16 for an
    array 1-16.
    """
    scores_per_epoch: int = 16
    """Looks at the losses, from which the steps to a loss are read."""
    scored: int = 5_000
    """Training images that the training loss is measured on."""
    exam_probe: int = 8_000
    """Training examples in each of the two disjoint probes of the examination at equal loss, of
    plain runs.
    """
    equal_loss: float = 0.6
    units: int = 8
    """Measured units of every hidden layer, evenly spaced."""
    damping: float = 0.1
    """Of the updates that have a scale."""
    unit_damping: float = 1.0
    """Of their c: without it ReLU units that are hardly ever active take unbounded steps, and the
    runs diverge.
    """
    kl_clip: float = 1e-3
    """Their trust region. It, and the two dampings, were set on single runs of 300 steps of ELU and
    ReLU and are the same for all.
    """
    update_every: int = 50
    """Steps between two looks of the full update at its curvature; the others look at every step."""

    name: ClassVar[str] = "sweep"
    figures: ClassVar[tuple[str, ...]] = ("theory4",)
    sweeps: ClassVar[bool] = True
    small: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.replace:
            object.__setattr__(self, "resume", False)

    @property
    def whole(self) -> bool:
        """Not so for a job out of several, which may run beside this one."""
        return self.part[1] == 1

    def load(self) -> DataSet:
        """MNIST, checked, at half its resolution."""
        return _halved(synthetic_mnist() if self.smoke else mnist(self.data)).to(self.where())

    def settings(self) -> list[Setting]:
        """One per run, seed by seed: a sweep that is stopped has whole seeds."""
        self._check()
        found = [
            self._setting(cell, lr, seed)
            for seed in range(self.seeds)
            for cell in self._cells()
            for lr in self.lr
        ]
        number, count = self.part
        found = found[number - 1 :: count]
        return (
            [replace(s, epochs=1, depth=2, width=12, update_every=2) for s in found if s.seed < 1]
            if self.smoke
            else found
        )

    def _cells(self) -> list[Cell]:
        cells = [
            Cell(activation, update) for activation in self.activation for update in self.update
        ]
        if self.constant and "elu" in self.activation:
            cells += [
                Cell("elu", update, self.constant)
                for update in CONSTANT_UPDATES
                if update in self.update
            ]
        if self.batch_norm and "plain" in self.update:
            cells += [
                Cell(activation, batch_norm=True)
                for activation in NORMED
                if activation in self.activation
            ]
        return cells

    def _setting(self, cell: Cell, lr: float, seed: int) -> Setting:
        return Setting(
            self.name, cell.activation, seed, self.epochs, BATCH_SIZE, lr, 0.0, self.depth, self.width, "normal", 2_000, self.exam_probe,
            means_every=1, fisher_every=0, equal_loss=self.equal_loss, units_measured=self.units, damping=1e-3, skip_input_layer=True,
            update=cast(Update, cell.update), constant=cell.constant, batch_norm=cell.batch_norm,
            update_damping=self.damping, update_unit_damping=self.unit_damping, update_kl_clip=self.kl_clip, update_every=self.update_every,
            scores_per_epoch=self.scores_per_epoch, scored=self.scored, examined=cell == Cell(cell.activation),
        )  # fmt: skip

    def folder(self, setting: Setting) -> Path:
        """The folder of a run."""
        added = (
            f"-plus{setting.constant:g}"
            if setting.constant
            else "-bn"
            if setting.batch_norm
            else ""
        )
        return (
            self.out
            / f"{setting.activation}{added}-{setting.update}-lr{setting.lr:g}-{setting.seed}"
        )

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        return trial(setting, data)

    def _check(self) -> None:
        self.check()
        at_least_one(
            self,
            "seeds",
            "epochs",
            "depth",
            "width",
            "scores_per_epoch",
            "scored",
            "exam_probe",
            "units",
            "update_every",
        )
        positive(self, "equal_loss", "kl_clip")
        not_negative(self, "damping", "unit_damping")
        for lr in self.lr:
            positive(SimpleNamespace(lr=lr), "lr")
        for name in ("activation", "update", "lr"):
            distinct(name, getattr(self, name))
        if not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(
                "--part must be a job's number and how many there are, such as 1 16, got "
                f"{self.part[0]} {self.part[1]}."
            )
        if (self.ensemble or self.graph) and self.update != ("plain",):
            raise ValueError(
                "--ensemble and --graph train by plain gradient descent alone: give --update "
                "plain, or leave them out."
            )


def _halved(data: DataSet) -> DataSet:
    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.view(-1, 1, 28, 28), 2).flatten(1)

    return replace(
        data, x_train=pooled(data.x_train), x_valid=pooled(data.x_valid), x_test=pooled(data.x_test)
    )
