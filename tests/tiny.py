"""An experiment of seconds: in a module of its own, because worker processes must be able to import
it.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from biasshift.data import DataSet, digits, shifted
from biasshift.experiments.demo import Demo
from biasshift.experiments.mlp_trial import Setting, trial
from biasshift.training.trial import Phase, Trial

DEPTH, WIDTH, EPOCH_STEPS = 3, 10, 23
LAYERS = ["0", "2", "4", "6"]
UNITS = [0, 2, 5, 7]  # four of ten, evenly spaced


@cache
def data() -> DataSet:
    return shifted(digits(), side=8)


@dataclass(frozen=True, kw_only=True)
class Tiny(Demo):
    """The demo with 3 hidden layers × 10 units and 2 epochs."""

    out: Path = Path("tiny")
    activations: tuple[str, ...] = ("elu", "relu")
    seeds: int = 1
    epochs: int = 2
    lr: float = 0.05
    momentum: float = 0.0
    equal_loss: float = 2.2
    skip_input_layer: bool = False
    workers: int | None = 1
    replace: bool = False
    device: str = "cpu"
    diverging: tuple[str, ...] = ()  # activations that are lost in their fifth step

    name: ClassVar[str] = "tiny"

    def load(self) -> DataSet:
        return data()

    def settings(self) -> list[Setting]:
        self.check()
        return [
            Setting(
                self.name, activation, seed, self.epochs, 64, self.lr, self.momentum, DEPTH, WIDTH, "normal", probe_size=200,
                exam_size=1500, means_every=1, fisher_every=2, equal_loss=self.equal_loss, units_measured=4, damping=1e-3,
                skip_input_layer=self.skip_input_layer,
            )
            for seed in range(self.seeds)
            for activation in self.activations
        ]  # fmt: skip

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        made = trial(setting, data)
        lost = Phase(5, math.inf)
        return (
            replace(made, phases=(*made.phases, lost))
            if setting.activation in self.diverging
            else made
        )
