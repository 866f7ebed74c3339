"""The moments of a training at which the disk is asked for something, and faults at one of them."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch

Fault = Callable[[], None]


class Points:
    """Counts the moments, in their order, and calls a fault at one of them, or from there on."""

    def __init__(self, at: int = -1, fault: Fault = lambda: None, last: int | None = None):
        self.passed: list[str] = []
        self.at, self.fault, self.last = at, fault, at if last is None else last

    def reach(self, name: str) -> bool:
        """Passes a moment; returns whether it is one of the fault's."""
        self.passed.append(name)
        return self.at <= len(self.passed) - 1 <= self.last

    def __call__(self, name: str) -> None:
        if self.reach(name):
            self.fault()


@contextmanager
def watching(points: Points) -> Iterator[Points]:
    """Passes a point before, in and after everything that changes a file in the block."""
    real_open = os.open

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        creates = bool(flags & os.O_CREAT)
        if creates:
            points("before os.open")
        descriptor = real_open(path, flags, *rest, **more)
        if creates:
            points("after os.open")
        return descriptor

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            points(f"before {name}")
            value = call(*arguments, **options)
            points(f"after {name}")
            return value

        return wrapped

    def inside(name: str, call: Callable[..., Any], position: int) -> Callable[..., Any]:
        """The fault comes when half of the file is written."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            value = call(*arguments, **options)
            if points.reach(f"inside {name}"):
                target = arguments[position]
                if hasattr(target, "flush"):
                    target.flush()
                path = getattr(target, "name", target) if hasattr(target, "flush") else target
                os.truncate(path, os.path.getsize(path) // 2)
                points.fault()
            return value

        return wrapped

    with (
        mock.patch.object(os, "open", opened),
        mock.patch.object(os, "replace", around("os.replace", os.replace)),
        mock.patch.object(os, "fsync", around("os.fsync", os.fsync)),
        mock.patch.object(os, "unlink", around("os.unlink", os.unlink)),
        mock.patch.object(os, "mkdir", around("os.mkdir", os.mkdir)),
        mock.patch.object(torch, "save", inside("torch.save", torch.save, 1)),
        mock.patch.object(pq, "write_table", inside("write_table", pq.write_table, 1)),
        mock.patch.object(Path, "write_text", inside("write_text", Path.write_text, 0)),
    ):
        yield points


def kill() -> None:
    """Ends this process as the system does: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, "No space left on device")
