"""The paper's experiments: each is a file with its constants, its options and its trial.

Public names load when they are first used (PEP 562): options and their help need no tables.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biasshift.experiments.demo import Demo as Demo
    from biasshift.experiments.exam import examine as examine
    from biasshift.training.runner import run as run

__all__ = ["Demo", "examine", "run"]

_MODULES = {"Demo": "experiments.demo", "examine": "experiments.exam", "run": "training.runner"}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"Module 'biasshift.experiments' has no attribute '{name}'.")
    value = getattr(import_module(f"biasshift.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
