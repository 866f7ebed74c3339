"""Training loops as generators, and what surrounds them."""

from biasshift.training.ensembles import Ensemble
from biasshift.training.evaluating import evaluate
from biasshift.training.loop import Diverged, Step, train
from biasshift.training.updating import Gradient

__all__ = ["Diverged", "Ensemble", "Gradient", "Step", "evaluate", "train"]
