"""Where a run comes from: the command line, the code and its libraries, the device, the time."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


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


def _code_version() -> dict[str, Any]:
    """Commit and dirty flag when the package runs from its own checkout, its version otherwise."""
    from importlib import metadata

    root = Path(__file__).resolve().parent.parent

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
