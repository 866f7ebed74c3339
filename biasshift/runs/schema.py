"""The files of a run folder: their names, their types, and how they are read without trusting them.

config.json             the typed options, and the version of this layout
provenance.json         command line, commit or version, library versions, device, seed, start
state.json              running / finished / interrupted / failed, the last step on disk, and the
                        SHA-256 of all other files: what it does not list is not yet part of the run
segment-00000.parquet   rows (step, layer, unit); one segment per flush
checkpoint.pt           where a run stands that is not finished
checkpoint.next.pt      the one behind it, while not all members of an ensemble have theirs
.lock                   who writes the run, as long as somebody does
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from biasshift.runs.integrity import unsealed

LAYOUT = 1
STATES = ("running", "finished", "interrupted", "failed")
KEYS = ("step", "layer", "unit")  # stored as int64, text, int32
# Stored as float32: well-scaled quantities, for which seven digits are plenty. All other columns
# are float64: losses differ late in their digits, 1 - coupling may be 1e-8, and c, s and k0 may
# leave float32's range.
FLOAT32 = frozenset(
    "mean var total own incoming second_order k effective_samples norm_mean_p norm_mean_q "
    "norm_corrected_mean cos_gradient cos_centered cos_diagonal norm_ratio mean_in_abs".split()
)
FLOAT64 = frozenset(
    "mean_delta2 s k0 coupling epoch seconds train_loss batch_loss valid_loss valid_error "
    "test_loss test_error".split()
)
RESERVED = FLOAT32 | FLOAT64 | {*KEYS, "run", "state", "last_step", "started", "updated"}

SEGMENT = re.compile(r"segment-(\d{5,})\.parquet")
RUN_FILE = re.compile(
    r"segment-\d{5,}\.parquet|(config|provenance|state)\.json|checkpoint(\.next)?\.pt"
)
TEMPORARY_FILE = re.compile(
    rf"\.({RUN_FILE.pattern}|\.lock)(\.[0-9a-f]{{8}}-\d+-[0-9a-f]{{8}})?\.tmp"
)
LOCK = ".lock"
CHECKPOINT, NEXT_CHECKPOINT = "checkpoint.pt", "checkpoint.next.pt"
MAX_JSON_BYTES = 10_000_000


def check_config(config: Mapping[Any, Any]) -> None:
    """Raises an error if a config cannot become columns of the table.

    Raises:
        ValueError: if a key is not text or is the name of a column that runs measure, or a whole
            number needs more than 64 bits.
    """
    for key, value in config.items():
        if not isinstance(key, str) or key in RESERVED:
            raise ValueError(
                f"Config key {key!r} must be text, and not a column of the table. Rename it."
            )
        if isinstance(value, int) and not fits(value):
            raise ValueError(
                f"Config key '{key}' must fit 64 bits, got {value}. Choose a smaller number."
            )


def fits(value: int) -> bool:
    """Tells whether a whole number fits 64 bits."""
    return -(2**63) <= value < 2**63


def is_run(folder: Path) -> bool:
    """Tells whether a folder has a config.json that biasshift wrote, whatever became of it."""
    return "biasshift_run" in parse_json(folder, "config.json", {})


def segment_name(number: int) -> str:
    """Returns the file name of a segment, numbered from 0."""
    return f"segment-{number:05d}.parquet"


def segment_files(folder: Path) -> list[tuple[int, str]]:
    """Returns number and file name of each segment of a run, in the order of their numbers."""
    matches = map(SEGMENT.fullmatch, os.listdir(folder))
    return sorted((int(match[1]), match[0]) for match in matches if match)


def own_file(folder: Path, name: str) -> Path:
    """Returns the path of an ordinary file that lies in the folder itself.

    Raises:
        ValueError: if it is a link to somewhere else, is missing, or is a folder or a pipe.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"'{path}' is a link out of its run. Replace it by the file itself.")
    if not path.is_file():
        raise ValueError(
            f"'{path}' is missing or not an ordinary file. Restore it, or move the run out of the "
            "way."
        )
    return path


def read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the object in a JSON file of a run folder, without its digest.

    Args:
        folder: the run's.
        name: of the file.
        default: what to return where the file is not there; None: then it is an error.

    Raises:
        ValueError: if the file is damaged, too large, not an object, or holds NaN, infinity or lone
            surrogates.
    """
    return read_sealed(folder, name, default)[0]


def read_sealed(
    folder: Path, name: str, default: dict[str, Any] | None = None
) -> tuple[dict[str, Any], bool]:
    """Returns what `read_json` does, and whether the file has a digest, which is then right."""
    value = parse_json(folder, name, default)
    try:
        return unsealed(value)
    except ValueError as error:
        raise ValueError(
            f"'{folder / name}' is damaged ({first_line(error)}). Restore it, or move the run out "
            "of the way: its other files are untouched."
        ) from error


def parse_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what `read_json` does, but with the digest, which may be wrong."""
    if default is not None and not os.path.lexists(folder / name):
        return default
    path = own_file(folder, name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"Must be at most {MAX_JSON_BYTES:,} bytes.")
        value = json.loads(path.read_text(encoding="utf-8"))
        # Refuses NaN, infinity and lone surrogates.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if not isinstance(value, dict):
            raise ValueError("Must be an object.")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is not readable JSON ({first_line(error)}). Restore it, or move the run out "
            "of the way."
        ) from error
    return value


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options that a run was made with.

    Raises:
        ValueError: if config.json is damaged, of another layout, or has a key that cannot be a
            column.
    """
    path = Path(folder) / "config.json"
    return config_of(path, read_json(path.parent, path.name))


def config_of(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options in what a config.json holds; ``path`` is that file's, for messages.

    Raises:
        ValueError: as `read_config`.
    """
    config = stored.get("config")
    if stored.get("biasshift_run") != LAYOUT or not isinstance(config, dict):
        raise ValueError(
            f"'{path}' must be of layout {LAYOUT}. Read it with the version that wrote it."
        )
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged ({first_line(error)}). Restore it.") from error
    return config


def conform(table: pa.Table) -> pa.Table:
    """Returns the same columns in the types of the layout, the keys first.

    What is stored and what is read both pass through here.

    Raises:
        ValueError: if a key is missing, a name comes twice, or a column has another kind of values.
    """
    names = table.column_names
    if sorted(names) != sorted({*KEYS, *names}):
        raise ValueError("Columns step, layer and unit must be there, and no column twice.")
    return pa.table({name: _column(name, table[name]) for name in dict.fromkeys([*KEYS, *names])})


def _column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if name == "layer":
        kind = kind.value_type if types.is_dictionary(kind) else kind
        valid, expected = types.is_string(kind) or types.is_large_string(kind), "text"
        column = column.cast(pa.string()) if valid else column
    elif name in KEYS:
        valid, expected = types.is_integer(kind), "whole numbers"
    else:
        valid, expected = types.is_integer(kind) or types.is_floating(kind), "numbers"
    gaps = column.null_count
    if not valid or (name in KEYS and gaps):
        raise ValueError(f"Column '{name}' must hold {expected}, got {kind} with {gaps} gaps.")
    if name == "layer":
        return column.dictionary_encode()
    default = pa.float32() if name in FLOAT32 else pa.float64()
    return column.cast({"step": pa.int64(), "unit": pa.int32()}.get(name, default))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, to quote it in another one.

    Without its full stop; the name of the error's type where there is no message.
    """
    return str(error).strip().split("\n")[0].removesuffix(".") or type(error).__name__
