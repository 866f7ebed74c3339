"""Where a run comes from: the command line, the code and its libraries, the device, the time."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from biasshift.runs.reader import find_runs
from biasshift.runs.schema import read_json

if TYPE_CHECKING:
    import pandas as pd

_PATH = re.compile(r"(?P<drive>[A-Za-z]:[\\/])|/|\.\.?/|~[^/]*/")


def provenance(config: Mapping[str, Any], device: Any) -> dict[str, Any]:
    import torch

    on_gpu = str(device).startswith("cuda")
    return {
        "command": sys.argv,
        **_code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"{device} ({platform.machine()})",
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
            ["git", "--no-optional-locks", "-C", str(root), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed package may lie below another project's checkout, whose commit says nothing
        # about it.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return {
                "commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            }
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return {"version": metadata.version("biasshift")}
    except metadata.PackageNotFoundError:
        return {"version": None}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def origin(table: pd.DataFrame, paths: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """What made the runs, and what made the table of them."""
    made_by = {"condensed_by": " ".join(map(shortened, sys.argv)), **_code()}
    if "run" not in table:  # benchmarks
        return {
            "commands": ["python -m benchmarks"],
            **{f"{name}s": _distinct(table[name]) for name in ("commit", "device")},
            **made_by,
        }
    folders, shown = find_runs(paths), set(table["run"].astype(str))
    origins = [
        read_json(folder, "provenance.json", {}) for folder in folders if _is_among(folder, shown)
    ]
    return {
        "commands": _distinct(" ".join(map(shortened, words(origin))) for origin in origins),
        "commits": _distinct(
            str(origin.get("commit") or origin.get("version")) + "+" * bool(origin.get("dirty"))
            for origin in origins
        ),
        "devices": _distinct(str(origin.get("device")) for origin in origins),
        "seeds": sorted({int(seed) for seed in table["seed"].dropna()}) if "seed" in table else [],
        "runs": len(origins),
        **made_by,
    }


def origin_said(found: dict[str, Any]) -> str:
    """What made the runs, in a sentence for people."""
    known = {
        name: [text for text in found[name] if text not in ("", "None")]
        for name in ("commands", "commits", "devices")
    }
    parts = [f"Of {found['runs']} runs with the seeds {', '.join(map(str, found['seeds']))}"]
    parts += ["made by " + "; ".join(f"`{command}`" for command in known["commands"])] * bool(
        known["commands"]
    )
    parts += ["at commit " + ", ".join(known["commits"])] * bool(known["commits"])
    parts += ["on " + ", ".join(known["devices"])] * bool(known["devices"])
    return ", ".join(parts) + "."


def _code() -> dict[str, str]:
    """The code that condenses, and when."""
    ours = provenance({}, "cpu")
    return {
        "condensed_with": str(ours.get("commit") or ours.get("version"))
        + "+" * bool(ours.get("dirty")),
        "condensed": ours["started"],
    }


def _is_among(folder: Path, runs: set[str]) -> bool:
    return any(folder.resolve().as_posix().endswith("/" + run) for run in runs)


def _distinct(texts) -> list[str]:
    return list(dict.fromkeys(texts))


def words(origin: Mapping[str, Any]) -> list[str]:
    """The command line that a run was made with."""
    command = origin.get("command")
    return [str(word) for word in command] if isinstance(command, list) else []
