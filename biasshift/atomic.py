"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name in the same folder, which becomes ``path`` at the end of the block.

    A reader sees the earlier file or the new one, never a part of it, also after a crash or a power
    cut. If the block raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        FileNotFoundError: when the block has written nothing.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            # Before the renaming, or a power cut may leave the name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
