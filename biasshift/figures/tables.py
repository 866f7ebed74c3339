"""Small tables that stand for many runs: written with their origin, and read from the package."""

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biasshift.atomic import replacing
from biasshift.runs.provenance import table_provenance
from biasshift.runs.schema import first_line

MOST_BYTES = 2_000_000
KEY = b"biasshift"


def save(
    name: str,
    table: pd.DataFrame,
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
) -> Path:
    """Writes a figure's small table as `<name>.parquet` and returns the path.

    Its origin (commands, commits, devices, seeds) is JSON in the metadata of the Parquet schema,
    where `load_origin` finds it. A file that was there is replaced when the new one is complete.

    Args:
        paths: the folders of the runs that the table was made of.

    Raises:
        ValueError: the table is larger than 2 MB.
    """
    metadata = {"figure": name, **table_provenance(table, paths)}
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({KEY: json.dumps(metadata, ensure_ascii=False).encode()})
    path = Path(folder) / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(arrow, file, compression="zstd")  # to pyarrow, names are UTF-8
        if (size := temporary.stat().st_size) > MOST_BYTES:
            raise ValueError(
                f"The table of figure {name} has {size:,} bytes, more than {MOST_BYTES:,}. Give "
                "fewer runs."
            )
    return path


def committed(name: str) -> Path | None:
    """Returns the path of the table that comes with the package, or None where none does.

    In a checkout, the table is the one in `paper_figs/results`.
    """
    installed = resources.files("biasshift") / "results" / f"{name}.parquet"
    checkout = Path(__file__).resolve().parents[2] / "paper_figs" / "results" / f"{name}.parquet"
    return next((path for path in (Path(str(installed)), checkout) if path.is_file()), None)


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Reads a small table. Nothing in it is executed.

    Raises:
        ValueError: the file is damaged, or is not such a table.
    """
    try:
        with pq.ParquetFile(path) as file:
            if KEY not in (file.schema_arrow.metadata or {}):
                raise ValueError("Its metadata name no figure.")
            return file.read().to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' is not a table of a figure ({first_line(error).rstrip('.')}). Make it again "
            "with `biasshift figure`."
        ) from error


def load_origin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads where a small table comes from: its figure, and what made its runs.

    The keys are `figure` and those of `biasshift.runs.provenance.table_provenance`; the dictionary
    is empty for a file that does not record them.
    """
    return json.loads((pq.read_schema(path).metadata or {}).get(KEY, b"{}"))
