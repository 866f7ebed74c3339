"""Is it causal? Networks trained by updates that take the bias shift out, beside those that do not.

The paper argues that mean activations near zero help because they bring the gradient nearer to the
unit natural gradient. If that is the reason, then an update that centers incoming activations
should help ReLU networks more than ELU networks, and close the gap between them; and a constant
added to ELU's activations should slow gradient descent and not the centered update.

Every cell (activation × update × constant × batch normalization) is trained at the same learning
rates with the same seeds: nothing is tuned for one of them. The images are MNIST's, averaged over
2×2 pixels: the input layer's blocks of the full update are then sixteen times smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from biasshift.activations import folder_part
from biasshift.data import DataSet, mnist, synthetic_mnist
from biasshift.data.dataset import data_root
from biasshift.distributed import under_torchrun
from biasshift.experiments.experiment import Activation
from biasshift.experiments.mlp_trial import MlpConfig, MlpExperiment, Update
from biasshift.training.engine import Engine
from biasshift.training.launchers import Launcher, checked, launch

ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu", "srelu")
UPDATES: tuple[Update, ...] = ("plain", "centered", "quasi-diagonal", "full")
# around the paper's, from where all are slow to where most diverge
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CONSTANT = 0.5  # about what separates ReLU's mean activation from ELU's
CONSTANT_UPDATES: tuple[Update, ...] = ("plain", "centered")
# with batch normalization, too, by plain gradient descent
NORMED: tuple[Activation, ...] = ("elu", "relu")
SEEDS = 6  # fewer cannot carry a paired test
EPOCHS = 1
DEPTH, WIDTH, BATCH_SIZE = 8, 128, 64  # those of Figure 2
PLAIN = {"update": "plain", "constant": 0.0, "batch_norm": False}


@dataclass(frozen=True, kw_only=True)
class Sweep(MlpExperiment):
    """Train activations × updates × learning rates × seeds on MNIST, for the causal claims;
    resumable, and in parts.
    """

    activation: tuple[Activation, ...] = ACTIVATIONS
    """Activation functions; each gets all updates, learning rates and seeds. Also elu:α,
    lrelu:slope, or any module by package.module:Class."""
    update: tuple[Update, ...] = UPDATES
    """Gradient descent, centered (bias shift removed), quasi-diagonal or full natural gradient."""
    lr: tuple[float, ...] = LEARNING_RATES
    """Learning rates; every cell gets all of them."""
    constant: float = CONSTANT
    """Added to ELU's activations in further runs, plain and centered. 0: no such runs."""
    batch_norm: bool = True
    """Further plain runs of the ELU and ReLU networks, with batch normalization."""
    seeds: int = SEEDS
    """Runs per activation function, update and learning rate."""
    epochs: int = EPOCHS
    """Passes over the training data."""
    depth: int = DEPTH
    """Number of hidden layers."""
    width: int = WIDTH
    """Units of every hidden layer."""
    data: Path | None = None
    """Folder with MNIST/raw; by default $BIASSHIFT_DATA, else ./data. Downloaded if missing."""
    out: Path = Path("runs/sweep")
    """Run folders are written below."""
    resume: bool = True
    """Skip the runs that are finished, and resume those that are not."""
    part: tuple[int, int] = (1, 1)
    """One job's share of the runs: --part $SLURM_ARRAY_TASK_ID 16 for a Slurm array 1-16."""
    launcher: Launcher = "local"
    """What carries the runs out: processes of this machine, Slurm jobs, or workers of dask or Ray.
    Results do not depend on it. --workers is how many run at a time."""
    launcher_options: tuple[str, ...] = ()
    """KEY=VALUE. Slurm: partition, time (minutes; 60), gpus, cpus, cluster=local to try it here.
    dask and Ray: address, without which they start workers here."""
    scores_per_epoch: int = 16
    """Times an epoch that the losses are measured, from which the steps to a loss are read."""
    scored: int = 5_000
    """Training images that the training loss is measured on."""
    exam_probe: int = 8_000
    """Training examples in each of the two probes of the examination at equal loss (plain runs)."""
    equal_loss: float = 0.6
    """Training loss (nats) at which plain runs are examined."""
    units: int = 8
    """Measured units of every hidden layer, evenly spaced."""
    damping: float = 0.1
    """Of the updates that have a scale."""
    # Without it ReLU units that are hardly ever active take unbounded steps, and the runs diverge.
    unit_damping: float = 1.0
    """Damping of c, for updates that have a scale."""
    # It, and the two dampings, were set on single runs of 300 steps and are the same for all.
    kl_clip: float = 1e-3
    """Trust region of the updates that have a scale."""
    update_every: int = 50
    """Steps between two curvature updates of the full update; the others update at every step."""

    name: ClassVar[str] = "sweep"
    figures: ClassVar[tuple[str, ...]] = ("theory4",)
    sweeps: ClassVar[bool] = True
    smoke_config: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "depth": 2,
        "width": 12,
        "update_every": 2,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace:
            object.__setattr__(self, "resume", False)

    @property
    def whole(self) -> bool:
        """Whether this command makes all runs: not so for one job out of several."""
        return self.part[1] == 1

    def launch(self) -> Callable[[], Engine] | None:
        """Returns what starts the engine of ``launcher``; None for processes of this machine."""
        return launch(self.launcher, self.launcher_options, self.workers, self.out.resolve())

    def sent(self) -> "Sweep":
        """Returns the same options for processes that may work in another folder."""
        return replace(self, out=self.out.resolve(), data=data_root(self.data).resolve())

    def load(self) -> DataSet:
        """Returns MNIST, checked, at half its resolution: 14 × 14 pixels, each a mean over four.

        Raises:
            FileNotFoundError: Files are missing, and downloading them failed.
            RuntimeError: A file is damaged, or is not what its name says.
        """
        data = synthetic_mnist() if self.smoke else mnist(self.data)
        images = {name: _halved(getattr(data, name)) for name in ("x_train", "x_valid", "x_test")}
        return replace(data, **images).to(self.where())

    def grid(self) -> list[MlpConfig]:
        """Returns one config per seed, cell and learning rate, or this job's part of them.

        The order is seed by seed: a sweep that is stopped has whole seeds. A part takes every so
        many runs, such that all parts together have each run once.
        """
        configs = [
            self._filled(
                MlpConfig,
                **cell,
                experiment=self.name,
                lr=lr,
                seed=seed,
                batch_size=BATCH_SIZE,
                momentum=0.0,
                init="normal",
                probe_size=2_000,
                exam_size=self.exam_probe,
                means_every=1,
                fisher_every=0,
                units_measured=self.units,
                damping=1e-3,
                skip_input_layer=True,
                update_damping=self.damping,
                update_unit_damping=self.unit_damping,
                update_kl_clip=self.kl_clip,
                examined=cell.items() >= PLAIN.items(),
            )
            for seed in range(self.seeds)
            for cell in self._cells()
            for lr in self.lr
        ]
        number, count = self.part
        return configs[number - 1 :: count]

    def _cells(self) -> list[dict[str, Any]]:
        """Activation, update, constant and batch normalization of every kind of run."""
        cells = [
            PLAIN | {"activation": activation, "update": update}
            for activation in self.activation
            for update in self.update
        ]
        if self.constant and "elu" in self.activation:
            cells += [
                PLAIN | {"activation": "elu", "update": update, "constant": self.constant}
                for update in CONSTANT_UPDATES
                if update in self.update
            ]
        if self.batch_norm and "plain" in self.update:
            cells += [
                PLAIN | {"activation": activation, "batch_norm": True}
                for activation in NORMED
                if activation in self.activation
            ]
        return cells

    def folder(self, config: MlpConfig) -> Path:
        """Returns the run folder of a config, named by its cell, learning rate and seed.

        The parts of a name stand in this order: activation, ``-plus`` and the constant or ``-bn``,
        update, learning rate, seed; such as ``elu-plus0.5-plain-lr0.1-0``.
        """
        plus = f"-plus{config.constant:g}" if config.constant else ""
        kind = folder_part(config.activation) + (plus or "-bn" * config.batch_norm)
        return self.out / f"{kind}-{config.update}-lr{config.lr:g}-{config.seed}"

    def check(self) -> None:
        """Refuses options out of their range, a part that does not exist, and what graphs exclude.

        Raises:
            ValueError: The message names the option and the remedy.
        """
        super().check()
        checked(self.launcher, self.launcher_options)
        if self.launcher != "local" and under_torchrun():
            raise ValueError(
                "--launcher must be left out under torchrun, where all processes train one network."
            )
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


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x.view(-1, 1, 28, 28), 2).flatten(1)
