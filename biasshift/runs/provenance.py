"""Where a run comes from: the command line, the code and its libraries, the device, the time."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pandas as pd

from biasshift.escapes import storable
from biasshift.runs.reader import find_runs
from biasshift.runs.schema import read_json

_PATH = re.compile(r"(?P<drive>[A-Za-z]:[\\/])|/|\.\.?/|~[^/]*/")


# -- of one run ------------------------------------------------------------------------------------


def provenance(config: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Returns what is known about the origin of a run that starts now.

    Keys ``command``, ``commit`` and ``dirty`` (or ``version``), ``torch``, ``python``, ``device``,
    ``seed`` and ``started``.

    Args:
        config: the run's options, for its seed.
        device: what the run computes on; a GPU is recorded by its model.
    """
    import torch  # here: who reads where runs come from does not need it

    on_gpu = str(device).startswith("cuda")
    return {
        "command": [storable(word) for word in sys.argv],
        **_code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"{device} ({platform.machine()})",
        "seed": config.get("seed"),
        "started": now(),
    }


def _code_version() -> dict[str, Any]:
    """Commit and dirty flag when the package runs from its own checkout, its version otherwise."""
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
    """Returns the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line(record: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command that a run was made with; none where it is not recorded."""
    command = record.get("command")
    return [str(word) for word in command] if isinstance(command, list) else []


def short_argument(word: str) -> str:
    """Returns a word of a command line for people: of a path somewhere on a machine, its name.

    >>> short_argument("/opt/biasshift/__main__.py"), short_argument("--data=/data/sets")
    ('biasshift', '--data=sets')
    >>> short_argument("runs/elu"), short_argument("lr=1/2")
    ('runs/elu', 'lr=1/2')
    """
    option, equals, value = ("", "", word) if _PATH.match(word) else word.rpartition("=")
    if not (path := _PATH.match(value)):
        return word
    name = (PureWindowsPath if path["drive"] else PurePosixPath)(value).name
    return "biasshift" if name == "__main__.py" else option + equals + (name or value)


# -- of a table of many runs -----------------------------------------------------------------------


def table_provenance(
    table: pd.DataFrame, paths: Sequence[str | os.PathLike[str]]
) -> dict[str, Any]:
    """Returns what made the runs of a table, and what made the table of them.

    Keys ``commands``, ``commits``, ``devices`` (each without repetition), ``seeds``, the number of
    ``runs``, and ``condensed_by``, ``condensed_with`` and ``condensed``: command, version of the
    code and time of the table. A commit with a plus had changes that were not committed.

    Args:
        table: rows with a column ``run``; without it, those of benchmarks, which have columns
            ``commit`` and ``device``.
        paths: the folders that the runs were read from.
    """
    ours = provenance({}, "cpu")
    condensed = {
        "condensed_by": " ".join(map(short_argument, sys.argv)),
        "condensed_with": _version(ours),
        "condensed": ours["started"],
    }
    if "run" not in table:
        return {
            "commands": ["python -m benchmarks"],
            **{f"{name}s": _distinct(table[name]) for name in ("commit", "device")},
            **condensed,
        }
    shown = tuple(f"/{run}" for run in table["run"].astype(str).unique())
    records = [
        read_json(folder, "provenance.json", {})
        for folder in find_runs(paths)
        if storable(folder.resolve().as_posix()).endswith(shown)
    ]
    return {
        "commands": _distinct(
            " ".join(map(short_argument, command_line(record))) for record in records
        ),
        "commits": _distinct(_version(record) for record in records),
        "devices": _distinct(str(record.get("device")) for record in records),
        "seeds": sorted({int(seed) for seed in table["seed"].dropna()}) if "seed" in table else [],
        "runs": len(records),
        **condensed,
    }


def provenance_sentence(record: Mapping[str, Any]) -> str:
    """Returns what made the runs of a table, in a sentence for people.

    Args:
        record: as `table_provenance` returns it.

    >>> record = {"runs": 2, "seeds": [0, 1], "commands": ["biasshift demo"], "commits": ["None"]}
    >>> provenance_sentence({**record, "devices": ["cpu (x86_64)"]})
    'Of 2 runs with the seeds 0, 1, made by `biasshift demo`, on cpu (x86_64).'
    """
    parts = [f"Of {record['runs']} runs with the seeds {', '.join(map(str, record['seeds']))}"]
    for key, verb, separator, quote in (
        ("commands", "made by", "; ", "`"),
        ("commits", "at commit", ", ", ""),
        ("devices", "on", ", ", ""),
    ):
        known = [f"{quote}{text}{quote}" for text in record[key] if text not in ("", "None")]
        parts += [f"{verb} {separator.join(known)}"] if known else []
    return ", ".join(parts) + "."


def _version(record: Mapping[str, Any]) -> str:
    commit = str(record.get("commit") or record.get("version"))
    return commit + "+" * bool(record.get("dirty"))


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
