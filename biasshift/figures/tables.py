"""Small tables that stand for many runs: written with where they come from, and read from the
package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasshift.atomic import replacing
from biasshift.runs.provenance import origin
from biasshift.runs.schema import first_line

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 2_000_000
KEY = b"biasshift"


def save(
    name: str,
    table: pd.DataFrame,
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
) -> Path:
    """Writes a figure's small table as `<name>.parquet`, with its origin as JSON in the schema's
    metadata; returns the path.

    Raises:
        ValueError: the table is larger than 2 MB.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pa.Table.from_pandas(table, preserve_index=False)
    found = found.replace_schema_metadata(
        {KEY: json.dumps({"figure": name, **origin(table, paths)}, ensure_ascii=False).encode()}
    )
    path = Path(folder) / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(found, temporary, compression="zstd")
        if (size := temporary.stat().st_size) > MOST_BYTES:
            raise ValueError(
                f"The table of figure {name} has {size:,} bytes, more than {MOST_BYTES:,}: give "
                "fewer runs."
            )
    return path


def committed(name: str) -> Path | None:
    """The table of a figure that comes with the package, or lies in the checkout that it runs from."""
    installed = resources.files("biasshift") / "results" / f"{name}.parquet"
    checkout = Path(__file__).resolve().parents[2] / "paper_figs" / "results" / f"{name}.parquet"
    return next((path for path in (Path(str(installed)), checkout) if path.is_file()), None)


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads a small table. Nothing in it is executed.

    Raises:
        ValueError: it is damaged, or no such table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if KEY not in (file.schema_arrow.metadata or {}):
                raise ValueError("it says of no figure that it belongs to")
            return file.read().to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no table of a figure ({first_line(error)}): make it anew with `biasshift "
            "figure`."
        ) from error


def load_origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Where a small table comes from."""
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(path).metadata or {}).get(KEY, b"{}"))
