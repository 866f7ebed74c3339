"""The demo: the paper's 8 × 128 comparison on handwritten digits that come with scikit-learn.

The counterpart in small of the paper's MNIST experiment (section 4.1, Figure 2). Where it differs,
and why:

* 8 × 8 digits, 1,437 to train, each at nine places (moved by up to one pixel). The unit Fisher
  statistics need ten effective samples per incoming activation: 1,280 for 128, out of reach for
  1,437 images once the network is sure of most of them.
* 60 epochs: the training losses of all four activations have come down by then.
* 16 units of each hidden layer stand for all 128 in the unit Fisher statistics: the blocks of all
  would take eight times as long.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from biasshift.data import DataSet, digits, shifted
from biasshift.experiments.experiment import Experiment
from biasshift.experiments.mlp_trial import Setting, trial
from biasshift.training.trial import Trial

EPOCHS, QUICK_EPOCHS = 60, 15
SEEDS, QUICK_SEEDS = 6, 2  # fewer than 6 cannot carry a paired test
BATCH_SIZE = 64  # as in the paper
LEARNING_RATE = 0.01  # as in the paper, for every activation function
MOMENTUM = 0.0  # the paper names none
DEPTH, WIDTH = 8, 128  # as in the paper
ACTIVATIONS = ("elu", "relu", "lrelu", "srelu")
PROBE, EXAM_PROBE = 2_000, 5_000  # of the 12,933 shifted images; there are two disjoint exam probes
UNITS = 16
MEANS_EVERY, FISHER_EVERY = 5, 20
EQUAL_LOSS = (
    0.6  # nats: reached by every activation, and most units still have enough effective samples
)
DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Demo(Experiment):
    """ELU, ReLU, LReLU and SReLU networks on handwritten digits, instrumented, with the theorems
    checked. Needs no download.
    """

    quick: bool = False
    """2 seeds and 15 epochs: shows that everything works, decides nothing."""
    out: Path = Path("runs/demo")
    """Run folders and figures are written here, by default those of --quick and --smoke below it;
    runs of an earlier demo are replaced.
    """
    replace: bool = True
    """Replace runs that are already there."""

    name: ClassVar[str] = "digits"
    figures: ClassVar[tuple[str, ...]] = ("2", "gap")
    small: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.out == Path("runs/demo") and (
            self.quick or self.smoke
        ):  # they could not be compared, nor may one spoil the other
            object.__setattr__(self, "out", self.out / ("smoke" if self.smoke else "quick"))
        if self.resume:
            object.__setattr__(self, "replace", False)

    def load(self) -> DataSet:
        """The digits at nine places each."""
        return shifted(digits(), side=8).to(self.where())

    def settings(self) -> list[Setting]:
        """One per run."""
        self.check()
        epochs, seeds = (QUICK_EPOCHS, QUICK_SEEDS) if self.quick else (EPOCHS, SEEDS)
        found = [
            Setting(
                self.name, activation, seed, epochs, BATCH_SIZE, LEARNING_RATE, MOMENTUM, DEPTH, WIDTH, "normal",
                PROBE, EXAM_PROBE, MEANS_EVERY, FISHER_EVERY, EQUAL_LOSS, UNITS, DAMPING, skip_input_layer=False,
            )
            for seed in range(seeds)
            for activation in ACTIVATIONS
        ]  # fmt: skip
        if self.smoke:
            return [
                replace(setting, epochs=2, depth=2, width=12, means_every=1, fisher_every=2)
                for setting in found
                if setting.seed < 1
            ]
        return found

    def trial(self, setting: Setting, data: DataSet) -> Trial:
        """The network of a setting, and what is measured of it."""
        return trial(setting, data)
