"""The paper's experiments: each is a file with its constants, its options and its trial.

Public names load when they are first used (PEP 562): options and their help need no tables.
"""

from typing import TYPE_CHECKING

from biasshift.lazy_names import lazy_names

if TYPE_CHECKING:
    from biasshift.experiments.demo import Demo as Demo
    from biasshift.experiments.exam import examine as examine
    from biasshift.training.runner import run as run

__all__ = ["Demo", "examine", "run"]

_MODULES = {"Demo": "experiments.demo", "examine": "experiments.exam", "run": "training.runner"}
__getattr__, __dir__ = lazy_names("biasshift.experiments", _MODULES)
