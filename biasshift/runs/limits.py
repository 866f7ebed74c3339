"""What the files of runs may ask for, by what their footers promise, before any row is loaded.

A few bytes of a Parquet file may stand for a billion equal rows. Rows of a run cannot be equal:
each has its own step, layer and unit, which takes room in the file, too.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from biasshift.runs.schema import KEYS, conform, own_file, segment_files

FEW_ROWS = 2**22  # 2 seconds and 200 MB: not worth a question
ROWS_PER_BYTE = 32  # of a file. Runs of 0.1 have at most one; here is room for better compression.
MAX_COLUMNS, MAX_GROUPS = 10_000, 10_000
BATCH_ROWS = 2**18
COPIES = 2  # of the table, while it is converted
_ELSE_BYTES = 8 * 2**30  # of memory, where the system does not tell


def read_bounded(
    file: pq.ParquetFile, size: int, columns: Sequence[str] | None, units: bool
) -> pa.Table:
    """Returns the rows of a segment in the types of the layout.

    Args:
        file: an open segment, of any origin.
        size: of the file, in bytes.
        columns: keep only these, besides the keys.
        units: False keeps only the rows of whole layers and networks, and never holds the others.

    Raises:
        ValueError: the file promises more than it can hold, or has other columns than a run.
    """
    refuse_swollen(file.metadata, size)
    conform(file.schema_arrow.empty_table())
    names = file.schema_arrow.names
    kept = None if columns is None else [name for name in names if name in {*KEYS, *columns}]
    if units:
        return conform(file.read(kept))
    parts = [
        conform(pa.Table.from_batches([batch])).filter(pc.field("unit") == -1)
        for batch in file.iter_batches(BATCH_ROWS, columns=kept)
    ]
    return pa.concat_tables(parts) if parts else conform(file.read(kept))


def refuse_swollen(footer: pq.FileMetaData, size: int) -> None:
    """Raises an error where a segment promises more rows than its file can hold.

    Asks the footer for nothing about single columns of a group: pyarrow ends the process where that
    part is damaged.

    Args:
        footer: of the file.
        size: of the file, in bytes.

    Raises:
        ValueError: without the name of the file.
    """
    if footer.num_columns > MAX_COLUMNS or footer.num_row_groups > MAX_GROUPS:
        raise ValueError(
            f"Segments have at most {MAX_COLUMNS:,} columns and {MAX_GROUPS:,} groups of rows."
        )
    rows = footer.num_rows
    if rows < 0 or rows > max(FEW_ROWS, ROWS_PER_BYTE * size):
        raise ValueError(
            f"Its {size:,} bytes cannot hold the {rows:,} different rows they promise."
        )


def refuse_too_large(folders: Sequence[Path], columns: Sequence[str] | None) -> None:
    """Raises an error where the rows of all runs together need more memory than there is.

    Segments without a readable footer are left to whoever reads them.

    Args:
        folders: of the runs.
        columns: that are read, besides the keys; None for all.

    Raises:
        ValueError: with the name of a folder.
    """
    needed, memory = 0, memory_bytes()
    for folder in folders:
        needed += COPIES * sum(_segment_bytes(folder, columns))
        if needed > memory:
            raise ValueError(
                f"The rows up to those of '{folder}' need {needed / 2**30:.3g} GiB of memory, and "
                f"there are {memory / 2**30:.3g}. Name fewer runs at a time."
            )


def file_bytes(file: BinaryIO) -> int:
    """Returns the size of an open file."""
    return os.fstat(file.fileno()).st_size


def memory_bytes() -> int:
    """Returns the memory that this process may have: the machine's, or its container's."""
    sizes = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max", where there is no limit
            pass
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        sizes.append(_ELSE_BYTES)
    return min(sizes)


def _segment_bytes(folder: Path, columns: Sequence[str] | None) -> Iterator[int]:
    """What each readable segment takes in memory."""
    for _, name in segment_files(folder):
        try:
            with open(own_file(folder, name), "rb") as file:
                footer = pq.read_metadata(file)
                refuse_swollen(footer, file_bytes(file))
            loaded = _loaded_bytes(footer, columns)
        except (pa.ArrowException, OSError, ValueError, LookupError):
            continue
        yield loaded


def _loaded_bytes(footer: pq.FileMetaData, columns: Sequence[str] | None) -> int:
    kept = [n for n in footer.schema.names if columns is None or n in {*KEYS, *columns}]
    groups = map(footer.row_group, range(footer.num_row_groups))
    unpacked = sum(max(0, group.total_byte_size) for group in groups)
    text = max(0, unpacked - footer.num_rows * 8 * footer.num_columns)  # what no number takes
    return footer.num_rows * 8 * len(kept) + text
