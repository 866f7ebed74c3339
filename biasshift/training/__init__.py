"""Training loops as generators, and what surrounds them."""

from biasshift.training.ensemble import Ensemble
from biasshift.training.evaluation import evaluate
from biasshift.training.loop import Diverged, Step, train
from biasshift.training.step import Gradient

__all__ = ["Diverged", "Ensemble", "Gradient", "Step", "evaluate", "train"]
