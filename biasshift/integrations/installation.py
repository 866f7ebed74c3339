"""Other libraries, imported when they are needed."""

from importlib import import_module
from typing import Any


def needed(what: str, *modules: str) -> Any:
    """Returns the first of some modules that is installed.

    Args:
        what: The name in the error message.
        modules: Import paths of the same thing.

    Raises:
        ModuleNotFoundError: When none of them is installed.
    """
    for module in modules:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and something that it needs is not
    name = modules[0].partition(".")[0]
    raise ModuleNotFoundError(
        f"'{what}' needs {name}. Install it with: pip install 'biasshift[integrations]'.", name=name
    )
