"""Data sets as tensors, and the minibatches of a training run as a function of its seed.

`digits`, `mnist`, `cifar10`, `cifar100` and `imagenet` return data sets in three splits, and
`whitened` and `shifted` change them. `TensorStream`, `ImageStream` and `batches` shuffle one into
minibatches. The ``synthetic_…`` sets have the same shapes and need no download.
"""

from biasshift.data.augmentation import Augment, Crop, Scale
from biasshift.data.cifar import cifar10, cifar100
from biasshift.data.dataset import DataSet, data_root
from biasshift.data.handwritten_digits import digits, mnist, shifted
from biasshift.data.image_folders import ImageNet, Images, imagenet
from biasshift.data.image_stream import CenterCrops, ImageStream, mean_image
from biasshift.data.stream import Stream, TensorStream, batches
from biasshift.data.synthetic import synthetic_cifar, synthetic_imagenet, synthetic_mnist
from biasshift.data.whitening import Whitening, whitened

__all__ = [
    "Augment",
    "CenterCrops",
    "Crop",
    "DataSet",
    "ImageNet",
    "ImageStream",
    "Images",
    "Scale",
    "Stream",
    "TensorStream",
    "Whitening",
    "batches",
    "cifar10",
    "cifar100",
    "data_root",
    "digits",
    "imagenet",
    "mean_image",
    "mnist",
    "shifted",
    "synthetic_cifar",
    "synthetic_imagenet",
    "synthetic_mnist",
    "whitened",
]
