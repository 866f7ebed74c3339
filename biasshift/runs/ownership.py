"""Who may write a run folder: one process at a time. Readers never ask.

The owner holds a lock of the operating system on the file .lock, which ends with the process,
however that ends. Where the file system has no locks, the file names the owner.
"""

import json
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from biasshift.atomic import process_exists, replacing
from biasshift.runs.schema import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SETTLING_SECONDS = 0.1  # between naming oneself and looking whether that name still stands

_owned: "weakref.WeakSet[Ownership]" = weakref.WeakSet()


class Ownership:
    """The right to write one run folder, until `release`, or until the object is forgotten.

    A process that is forked from this one does not inherit it.

    Args:
        folder: the run's; it must exist.

    Raises:
        FileExistsError: if a process that runs has it; the message names that process.
    """

    def __init__(self, folder: Path):
        self.folder, self.process = folder, os.getpid()
        path = folder / LOCK
        self._descriptor = _lock(path)
        if self._descriptor is None:
            _name_owner(path)
        self.release = weakref.finalize(self, _release, path, self._descriptor, self.process)
        _owned.add(self)

    def require(self) -> None:
        """Raises an error in a process that was forked from the owner.

        Raises:
            RuntimeError: if this is not the process that the run was opened in.
        """
        if os.getpid() != self.process:
            raise RuntimeError(
                f"The run '{self.folder}' belongs to process {self.process}, from which this one "
                "was forked. Write it there."
            )

    def __enter__(self) -> "Ownership":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _release(path: Path, descriptor: int | None, process: int) -> None:
    if os.getpid() != process:
        return
    # Under the lock: whoever opens the file meanwhile finds that it is no longer the one at the
    # path, and opens it again.
    with suppress(OSError):
        if descriptor is not None or _reads_as_ours(path):
            os.unlink(path)
    if descriptor is not None:
        os.close(descriptor)


def _close_in_child() -> None:
    """A lock lives as long as any copy of its descriptor, in whatever process."""
    for owner in list(_owned):
        if owner._descriptor is not None:
            with suppress(OSError):
                os.close(owner._descriptor)
        owner.release.detach()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


# -- locks of the operating system -------------------------------------------------------------


def _lock(path: Path) -> int | None:
    """Locks the file and returns its descriptor; None where the file system has no locks."""
    if fcntl is None:
        return None
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise _refusal(path) from None
        except OSError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _ours(), 0)
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise FileExistsError(
                f"'{path}' must be an ordinary file. Remove it, or choose another folder (--out)."
            ) from error
        raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file, which its owner removes at the end."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


# -- owners by name ----------------------------------------------------------------------------


def _name_owner(path: Path) -> None:
    """Writes this process's name into the file, unless a process that may still run has done so."""
    if _lives(_owner(path)):
        raise _refusal(path)
    with replacing(path) as temporary:
        temporary.write_bytes(_ours())
    # Of two that come at once, the later one's name stands.
    time.sleep(SETTLING_SECONDS)
    if not _reads_as_ours(path):
        raise _refusal(path)


def _ours() -> bytes:
    process = os.getpid()
    owner = {"host": socket.gethostname(), "process": process, "began": _began(process)}
    return json.dumps(owner).encode()


def _reads_as_ours(path: Path) -> bool:
    try:
        return path.read_bytes() == _ours()
    except OSError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    """Who the file names, {} where nobody is; it may be anything."""
    try:
        owner = json.loads(path.read_bytes()[:10_000])
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(owner, dict) and isinstance(owner.get("process"), int)
    return owner if known else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner may still run: of another machine, nobody here can tell."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    process = owner["process"]
    return process_exists(process) and owner.get("began") == _began(process)


def _began(process: int) -> str | None:
    """When a process began, which tells it from a later one of the same number; None: unknown."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _refusal(path: Path) -> FileExistsError:
    owner = _owner(path)
    host = owner.get("host")
    where = "" if host in (None, socket.gethostname()) else f" on {host}"
    who = f"process {owner['process']}{where}" if owner else "another process"
    remedy = f" If that process is gone, delete '{path}'." if where else ""
    return FileExistsError(
        f"'{path.parent}' is being written by {who}. Wait until it ends, or choose another folder "
        f"(--out).{remedy}"
    )
