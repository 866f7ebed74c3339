"""The paper's experiments: each is a file with its constants, its options and its trial."""

from biasshift.experiments.demo import Demo
from biasshift.experiments.exam import examine
from biasshift.training.runner import run

__all__ = ["Demo", "examine", "run"]
