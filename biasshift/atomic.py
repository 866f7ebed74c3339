"""Files that are written whole or not at all: the one way in which the package writes a file."""

import errno
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # a disk is full, or fails
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # of file systems that cannot sync a folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of an empty file in the same folder, which becomes ``path`` at the end.

    A reader sees the earlier file or the new one, never a part of it. Behind the block the new one
    is durable: the file and its name have been handed to the disk. If the block raises, the
    temporary file is removed and ``path`` stays as it was.

    The temporary name is unique, and created anew: a link that lies there is not followed, and two
    processes do not write into each other's file. What processes of this machine that are dead have
    left for the same path is removed.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        FileNotFoundError: when the block has written nothing.
        OSError: when the disk is full or fails, with the name of ``path``.
    """
    _remove_left_behind(path)
    temporary = _created(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            if not os.fstat(file.fileno()).st_size:
                raise FileNotFoundError(f"Nothing was written for '{path}'.")
            # Before the renaming, or a power cut may leave the name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and (reason := _no_room(error, temporary)):
            raise OSError(reason.errno, os.strerror(reason.errno or 0), str(path)) from error
        raise
    sync_folder(path.parent)


def _no_room(error: BaseException | None, temporary: Path) -> OSError | None:
    """The error of a disk that is full or fails, if that is behind this one: without a name that
    anybody knows. PyTorch covers it by an error of its own.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error if error.filename in (None, str(temporary)) else None
        seen.append(error)
        error = error.__context__
    return None


def sync_folder(folder: Path) -> None:
    """Makes the names of files in a folder durable; where a file system cannot, does nothing."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows does not open folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def process_exists(process: int) -> bool:
    """Tells whether a process of this machine runs, of whatever user."""
    if process <= 0:
        return False
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _start(path: Path) -> str:
    """The beginning of the names of a file's temporaries: names have 255 bytes at most."""
    return f".{path.name[:50]}."


def _created(path: Path) -> Path:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    name = f"{_start(path)}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = path.with_name(name)
    try:
        os.close(os.open(temporary, flags, 0o666))
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def _remove_left_behind(path: Path) -> None:
    start, host = _start(path), _host()
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(start)]
    except PermissionError:
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name, len(start))
        if match and match["host"] == host and not process_exists(int(match["process"])):
            with suppress(OSError):
                os.unlink(path.with_name(name))
