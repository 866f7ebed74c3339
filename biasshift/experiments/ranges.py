"""Options that are out of their range, refused by their names on the command line."""

import math
from collections.abc import Callable
from typing import Any


def at_least_one(options: Any, *names: str) -> None:
    """Refuses options below 1."""
    _refuse_unless(options, names, "at least 1", lambda value: value >= 1)


def positive(options: Any, *names: str) -> None:
    """Refuses options that are not above 0 and finite."""
    _refuse_unless(options, names, "a number above 0", lambda value: 0 < value < math.inf)


def shares(options: Any, *names: str) -> None:
    """Refuses options outside [0, 1)."""
    _refuse_unless(options, names, "in [0, 1)", lambda value: 0 <= value < 1)


def not_negative(options: Any, *names: str) -> None:
    """Refuses options below 0, and those that are not finite."""
    _refuse_unless(options, names, "a number of at least 0", lambda value: 0 <= value < math.inf)


def distinct(name: str, values: tuple) -> None:
    """Refuses an empty list, and one with a value twice."""
    if len(set(values)) != len(values) or not values:
        raise ValueError(f"{flag(name)} needs at least one value, and each of them once.")


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


def _refuse_unless(options: Any, names: tuple[str, ...], said: str, test: Callable[[float], bool]) -> None:
    for name in names:
        if not test(getattr(options, name)):
            raise ValueError(f"{flag(name)} must be {said}, got {getattr(options, name)}.")
