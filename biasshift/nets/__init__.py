"""The paper's networks, as functions that return plain PyTorch modules.

`mlp`, `autoencoder`, `cifar11`, `cifar18` and `imagenet15` are the networks of the figures and
tables; `stacks` builds others. Equal seeds give equal weights whatever the activation.
"""

from biasshift.nets.convnets import cifar11, cifar18, imagenet15
from biasshift.nets.convolution_stacks import stacks
from biasshift.nets.fully_connected import Shifted, autoencoder, mlp
from biasshift.nets.modules import SpatialPyramidPooling, StackDropout, set_dropout

__all__ = [
    "Shifted",
    "SpatialPyramidPooling",
    "StackDropout",
    "autoencoder",
    "cifar11",
    "cifar18",
    "imagenet15",
    "mlp",
    "set_dropout",
    "stacks",
]
