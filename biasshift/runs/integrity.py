"""Checksums of a run's files, by which a damaged one is told from the one that was written."""

import hashlib
import json
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

SEAL = "sha256"  # the key of a JSON object that has the digest of all its others


class UncheckedRunWarning(UserWarning):
    """A run folder of version 0.1 has no checksums: damage to its files would not be noticed."""


class DamagedRunWarning(UserWarning):
    """Damaged segments of a run were left out, as was asked for."""


def digest(value: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the content of a JSON object, however it is laid out.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1.0, "b": 2})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object with its own digest behind its keys."""
    return {**value, SEAL: digest(value)}


def unsealed(value: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the object without its digest, and whether it had one.

    Raises:
        ValueError: if it is not the digest of the other keys.

    >>> unsealed(sealed({"a": 1})), unsealed({"a": 1})
    (({'a': 1}, True), ({'a': 1}, False))
    """
    if SEAL not in value:
        return value, False
    rest = {key: item for key, item in value.items() if key != SEAL}
    if value[SEAL] != digest(rest):
        raise ValueError("Its content is not what its SHA-256 was taken of.")
    return rest, True


def file_digest(file: BufferedReader) -> str:
    """Returns the SHA-256 of an open file, read from its beginning, and goes back there."""
    file.seek(0)
    result = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return result
