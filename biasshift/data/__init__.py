"""Data sets as tensors, and the minibatches of a training run as a function of its seed."""

from biasshift.data.augmenting import Augment, Scale
from biasshift.data.cifar import cifar10, cifar100
from biasshift.data.handwritten import batches, digits, mnist, shifted
from biasshift.data.sets import DataSet, data_root
from biasshift.data.streams import Stream, TensorStream

__all__ = [
    "Augment",
    "DataSet",
    "Scale",
    "Stream",
    "TensorStream",
    "batches",
    "cifar10",
    "cifar100",
    "data_root",
    "digits",
    "mnist",
    "shifted",
]
