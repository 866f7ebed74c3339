"""An experiment of seconds, in a module of its own: worker processes must be able to import it."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from biasshift.data import DataSet, digits, shifted
from biasshift.experiments.demo import Demo
from biasshift.experiments.mlp_trial import MlpConfig, trial
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
    diverging: tuple[str, ...] = ()  # activations whose training diverges in its fifth step

    name: ClassVar[str] = "tiny"

    def load(self) -> DataSet:
        return data()

    def grid(self) -> list[MlpConfig]:
        return [
            self._filled(
                MlpConfig,
                experiment=self.name,
                activation=activation,
                seed=seed,
                batch_size=64,
                depth=DEPTH,
                width=WIDTH,
                init="normal",
                probe_size=200,
                exam_size=1500,
                means_every=1,
                fisher_every=2,
                units_measured=4,
                damping=1e-3,
            )
            for seed in range(self.seeds)
            for activation in self.activations
        ]

    def trial(self, config: MlpConfig, data: DataSet) -> Trial:
        made = trial(config, data)
        if config.activation not in self.diverging:
            return made
        return replace(made, phases=(*made.phases, Phase(5, math.inf)))
