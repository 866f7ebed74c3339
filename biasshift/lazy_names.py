"""Public names of a package that load when they are first used (PEP 562).

So that ``import biasshift`` is light, and commands that look at runs come without PyTorch. Type
checkers and editors find the names under ``if TYPE_CHECKING`` in the package itself.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], packages: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        homes: Public name → the module that defines it, below `biasshift`.
        packages: Public names that are packages within this one.
    """

    def load(name: str) -> Any:
        """Imports a public name at its first use."""
        if name in homes:
            value = getattr(import_module(f"biasshift.{homes[name]}"), name)
        elif name in packages:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(
                f"Module '{package}' has no attribute '{name}'.",
                name=name,
                obj=sys.modules.get(package),
            )
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        """Returns the public names, loaded or not."""
        return sorted({*homes, *packages, *getattr(sys.modules[package], "__all__", ())})

    return load, listed
