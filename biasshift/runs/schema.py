"""The files of a run folder: their names, their types, and how they are read without trusting them.

config.json             the typed options, and the version of this layout
provenance.json         command line, commit or version, library versions, device, seed, start
state.json              running / finished / interrupted / failed, and the last step on disk
segment-00000.parquet   rows (step, layer, unit); one segment per flush
checkpoint.pt           where a run stands that is not finished
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUT = 1
STATES = ("running", "finished", "interrupted", "failed")
KEYS = ("step", "layer", "unit")  # stored as int64, text, int32
# Stored as float32: well-scaled quantities, for which seven digits are plenty. All other columns
# are float64:
# losses differ late in their digits, 1 - coupling may be 1e-8, and c, s and k0 may leave float32's
# range.
FLOAT32 = frozenset(
    "mean var total own incoming second_order k effective_samples norm_mean_p norm_mean_q "
    "norm_corrected_mean "
    "cos_gradient cos_centered cos_diagonal norm_ratio mean_in_abs".split()
)
FLOAT64 = frozenset(
    "mean_delta2 s k0 coupling epoch seconds train_loss batch_loss valid_loss valid_error test_loss test_error".split()
)
RESERVED = FLOAT32 | FLOAT64 | {*KEYS, "run", "state", "last_step", "started", "updated"}

SEGMENT = re.compile(r"segment-(\d{5,})\.parquet")
OURS = re.compile(r"segment-\d{5,}\.parquet|(config|provenance|state)\.json|checkpoint\.pt")
TEMPORARY = re.compile(rf"\.({OURS.pattern})\.tmp")
MAX_JSON_BYTES = 10_000_000


def check_config(config: Mapping[Any, Any]) -> None:
    for key, value in config.items():
        if not isinstance(key, str) or key in RESERVED:
            raise ValueError(
                f"config key {key!r} is no text or is a column of the table already: rename the "
                "option"
            )
        if isinstance(value, int) and not fits(value):
            raise ValueError(
                f"config key '{key}' holds {value}, which needs more than 64 bits: choose a "
                "smaller number"
            )


def fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def is_run(folder: Path) -> bool:
    return "biasshift_run" in read_json(folder, "config.json", {})


def own_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"'{path}' is a link out of its run: replace it by the file itself")
    if not path.is_file():
        raise ValueError(
            f"'{path}' is missing or no ordinary file: restore it, or move the run out of the way"
        )
    return path


def read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not os.path.lexists(folder / name):
        return default
    path = own_file(folder, name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(
            value, ensure_ascii=False, allow_nan=False
        ).encode()  # refuses NaN, infinity and lone surrogates
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is no readable JSON ({first_line(error)}): restore it, or move the run out "
            "of the way"
        ) from error
    return value


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options that a run was made with."""
    folder = Path(folder)
    stored = read_json(folder, "config.json")
    config = stored.get("config")
    if stored.get("biasshift_run") != LAYOUT or not isinstance(config, dict):
        raise ValueError(
            f"'{folder / 'config.json'}' is of another layout than {LAYOUT}: read it with the "
            "version that wrote it"
        )
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"'{folder / 'config.json'}': {error}") from error
    return config


def conform(table: pa.Table) -> pa.Table:
    """The same columns in the types of the layout; what is stored and what is read both pass
    through here.
    """
    import pyarrow as pa

    names = table.column_names
    if sorted(names) != sorted({*KEYS, *names}):
        raise ValueError("columns step, layer and unit must be there, and no column twice")
    return pa.table(
        {
            name: _column(name, table[name])
            for name in [*KEYS, *(name for name in names if name not in KEYS)]
        }
    )


def _column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import types

    kind, text = column.type, name == "layer"
    if text:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        fits = types.is_string(kind) or types.is_large_string(kind)
        column = column.cast(pa.string()) if fits else column
    else:
        fits = types.is_integer(kind) or (types.is_floating(kind) and name not in KEYS)
    if not fits or (name in KEYS and column.null_count):
        expected = "text" if text else "whole numbers" if name in KEYS else "numbers"
        raise ValueError(
            f"column '{name}' holds {kind} ({column.null_count} gaps), expected {expected}"
        )
    stored = {"step": pa.int64(), "unit": pa.int32()}.get(
        name, pa.float32() if name in FLOAT32 else pa.float64()
    )
    return column.dictionary_encode() if text else column.cast(stored)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
