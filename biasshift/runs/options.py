"""The options of a run: what JSON can hold of them, and whether two runs have the same."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from biasshift.atomic import replacing
from biasshift.escapes import storable
from biasshift.runs.schema import config_of, first_line, parse_json


def options(config: Any) -> dict[Any, Any]:
    """Returns a mapping or dataclass as a dict."""
    return dict(config) if isinstance(config, Mapping) else asdict(config)


def require_same_config(folder: Path, config: Any) -> None:
    """Compares what would be stored with what is. Nothing is read from the file but that.

    An option that is not stored is newer than the run: of a dataclass, the default of its field
    says what runs did before.

    Raises:
        ValueError: if they differ; names the first option that does.
    """
    path = folder / "config.json"
    stored = config_of(path, parse_json(folder, path.name))
    wanted = json.loads(to_json(options(config)))
    before = {field.name: field.default for field in fields(config)} if is_dataclass(config) else {}
    for name in {**stored, **wanted}:
        if name not in stored and name in before and wanted[name] == before[name]:
            continue
        if name not in stored:
            raise ValueError(
                f"'{folder}' holds a run of another version, which does not record {name}. Choose "
                "another folder (--out), or give --replace."
            )
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"'{folder}' holds a run with {name} = {stored.get(name)!r}, and this one has "
                f"{wanted.get(name)!r}. Choose another folder (--out), or give --replace."
            )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON, whole or not at all."""
    text = to_json(value)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Mapping[str, Any]) -> str:
    """Returns an object as JSON; paths become texts.

    Raises:
        ValueError: if it holds something that JSON cannot, or a number that is not finite.
    """

    def plain(item: object) -> str:
        if isinstance(item, os.PathLike):
            return storable(os.fspath(item))
        raise TypeError(f"{item!r} is of type {type(item).__name__}.")

    try:
        return json.dumps(value, indent=2, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "A config must hold numbers, text, lists and dicts, all finite, but "
            f"{first_line(error)}."
        ) from error
