"""Where a run comes from: the command line, the code and its libraries, the device, the time."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_PATH = re.compile(r"(?P<drive>[A-Za-z]:[\\/])|/|\.\.?/|~[^/]*/")


def provenance(config: Mapping[str, Any], device: Any) -> dict[str, Any]:
    import torch

    on_gpu = str(device).startswith("cuda")
    return {
        "command": sys.argv,
        **_code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device} ({platform.machine()})",
        "seed": config.get("seed"),
        "started": now(),
    }


def shortened(word: str) -> str:
    """A word of a command line, for people; of a path somewhere on a machine, its name.

    >>> [shortened(word) for word in ("/opt/biasshift/__main__.py", "--data=/data/sets", "runs/elu", "lr=1/2")]
    ['biasshift', '--data=sets', 'runs/elu', 'lr=1/2']
    """
    option, equals, value = ("", "", word) if _PATH.match(word) else word.rpartition("=")
    if not (found := _PATH.match(value)):
        return word
    name = (PureWindowsPath if found["drive"] else PurePosixPath)(value).name
    return "biasshift" if name == "__main__.py" else option + equals + (name or value)


def _code_version() -> dict[str, Any]:
    """Commit and dirty flag when the package runs from its own checkout, its version otherwise."""
    from importlib import metadata

    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        # No optional locks: looking at a checkout must not disturb somebody's git command in it.
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie below another project's checkout, whose commit says nothing about it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return {"version": metadata.version("biasshift")}
    except metadata.PackageNotFoundError:
        return {"version": None}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
