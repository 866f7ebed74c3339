"""Measurements where people train: callbacks of other libraries' trainers, and loggers.

They are a few lines over `biasshift.instrument`. The other libraries are imported where a name is
first used, and ``pip install 'biasshift[integrations]'`` installs them.
"""

from typing import TYPE_CHECKING

from biasshift.lazy_names import lazy_names

if TYPE_CHECKING:
    from biasshift.integrations.hugging_face import HuggingFaceCallback as HuggingFaceCallback
    from biasshift.integrations.lightning_callback import LightningCallback as LightningCallback
    from biasshift.integrations.loggers import (
        to_mlflow as to_mlflow,
        to_tensorboard as to_tensorboard,
        to_wandb as to_wandb,
    )
    from biasshift.integrations.monitor import share as share
    from biasshift.integrations.scalars import layer_scalars as layer_scalars

__all__ = [
    "HuggingFaceCallback",
    "LightningCallback",
    "layer_scalars",
    "share",
    "to_mlflow",
    "to_tensorboard",
    "to_wandb",
]

_MODULES = {
    "HuggingFaceCallback": "integrations.hugging_face",
    "LightningCallback": "integrations.lightning_callback",
    "layer_scalars": "integrations.scalars",
    "share": "integrations.monitor",
    "to_mlflow": "integrations.loggers",
    "to_tensorboard": "integrations.loggers",
    "to_wandb": "integrations.loggers",
}

__getattr__, __dir__ = lazy_names("biasshift.integrations", _MODULES)
