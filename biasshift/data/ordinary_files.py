"""Files of data sets, which may come from anywhere: opened without waiting, read up to a size."""

import errno
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

MAX_MEMBERS = 100  # of a gzip file; most have one
_CHUNK = 2**20


def open_ordinary(path: str | Path) -> BinaryIO:
    """Opens a file to read its bytes, if it is an ordinary one.

    A pipe would be waited for, perhaps for ever, and a device may do anything.

    Raises:
        OSError: it is a pipe, a folder, a device, or cannot be opened; with a reason in
            ``strerror``.
    """
    _refuse_other(os.stat(path).st_mode, path)
    # Between the two it may have become something else: then this neither waits nor takes a
    # terminal.
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _refuse_other(os.fstat(file.fileno()).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def read_ordinary(path: str | Path, most: int) -> bytes:
    """Returns what a file holds, of at most ``most`` bytes.

    Raises:
        OSError: as `open_ordinary`, or it is larger.
    """
    with open_ordinary(path) as file:
        if os.fstat(file.fileno()).st_size <= most:
            content = file.read(most + 1)
            if len(content) <= most:
                return content
    raise OSError(errno.EFBIG, f"It has more than {most:,} bytes", str(path))


def unpacked_gzip(content: bytes, most: int) -> bytes:
    """Returns the first ``most`` bytes, at least, of what a gzip file holds.

    Whatever it would unpack to, it takes no more memory than that.

    Raises:
        zlib.error: it is not a whole gzip file. What comes behind the first ``most`` bytes is not
            looked at.
    """
    parts, size = [], 0
    for _ in range(MAX_MEMBERS):
        stream = zlib.decompressobj(wbits=31)  # with the header and the checksum of gzip
        while not stream.eof and size < most:
            part = stream.decompress(content, min(_CHUNK, most - size))
            content = stream.unconsumed_tail
            parts.append(part)
            size += len(part)
            if not part and not content and not stream.eof:
                raise zlib.error("It ends before its time.")
        content = stream.unused_data.lstrip(b"\0")
        if size >= most or not content:
            return b"".join(parts)
    raise zlib.error("It has more parts than any file.")


def _refuse_other(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is a pipe or a device", str(path))
