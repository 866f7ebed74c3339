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

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from biasshift.data import DataSet, digits, shifted
from biasshift.experiments.experiment import Activation
from biasshift.experiments.mlp_trial import SMOKE, MlpConfig, MlpExperiment

EPOCHS, QUICK_EPOCHS = 60, 15
SEEDS, QUICK_SEEDS = 6, 2  # fewer than 6 cannot carry a paired test
BATCH_SIZE = 64  # as in the paper
LEARNING_RATE = 0.01  # as in the paper, for every activation function
MOMENTUM = 0.0  # the paper names none
DEPTH, WIDTH = 8, 128  # as in the paper
ACTIVATIONS: tuple[Activation, ...] = ("elu", "relu", "lrelu", "srelu")
PROBE, EXAM_PROBE = 2_000, 5_000  # of the 12,933 shifted images; there are two disjoint exam probes
UNITS = 16
MEANS_EVERY, FISHER_EVERY = 5, 20
# nats: reached by every activation, and most units still have enough effective samples
EQUAL_LOSS = 0.6
DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Demo(MlpExperiment):
    """Compare ELU, ReLU, LReLU and SReLU networks, or others, on handwritten digits. Needs no
    download.
    """

    activation: tuple[Activation, ...] = field(default_factory=lambda: ACTIVATIONS)
    """Activation functions to compare; each gets all seeds. Also elu:α, lrelu:slope, or
    any module by package.module:Class."""
    quick: bool = False
    """2 seeds and 15 epochs: shows that everything works, decides nothing."""
    out: Path = Path("runs/demo")
    """Folder for runs and figures, which are replaced; of --quick and --smoke it is
    runs/demo-quick and runs/demo-smoke."""
    replace: bool = True
    """Replace runs that are already there."""

    name: ClassVar[str] = "digits"
    figures: ClassVar[tuple[str, ...]] = ("2", "gap")
    smoke_config: ClassVar[dict[str, Any]] = SMOKE

    def __post_init__(self) -> None:
        super().__post_init__()
        # Shortened runs could not be compared with full ones, nor may one spoil the other.
        if self.out == Path("runs/demo") and (self.quick or self.smoke):
            kind = "smoke" if self.smoke else "quick"
            object.__setattr__(self, "out", Path(f"runs/demo-{kind}"))
        if self.resume:
            object.__setattr__(self, "replace", False)

    def load(self) -> DataSet:
        """Returns the digits at nine places each, on the device; it downloads nothing."""
        return shifted(digits(), side=8).to(self.where())

    def grid(self) -> list[MlpConfig]:
        """Returns one config per seed and activation function: 24, or 8 of a quick demo.

        >>> len(Demo().configs()), len(Demo(quick=True).configs()), len(Demo(smoke=True).configs())
        (24, 8, 4)
        """
        return [
            MlpConfig(
                experiment=self.name,
                activation=activation,
                seed=seed,
                epochs=QUICK_EPOCHS if self.quick else EPOCHS,
                batch_size=BATCH_SIZE,
                lr=LEARNING_RATE,
                momentum=MOMENTUM,
                depth=DEPTH,
                width=WIDTH,
                init="normal",
                probe_size=PROBE,
                exam_size=EXAM_PROBE,
                means_every=MEANS_EVERY,
                fisher_every=FISHER_EVERY,
                equal_loss=EQUAL_LOSS,
                units_measured=UNITS,
                damping=DAMPING,
                skip_input_layer=False,
            )
            for seed in range(QUICK_SEEDS if self.quick else SEEDS)
            for activation in self.activation
        ]
