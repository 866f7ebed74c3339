"""Who carries out the runs of a command: this machine, Slurm, dask or Ray."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, Literal, get_args

from biasshift.training.engine import Engine

Launcher = Literal["local", "slurm", "dask", "ray"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)

# What an engine needs: the module, and what it is called.
_NEEDS = {
    "slurm": ("submitit", "submitit"),
    "dask": ("distributed", "dask.distributed"),
    "ray": ("ray", "Ray"),
}
_COUNTS = {"time": 1, "gpus": 0, "cpus": 1}  # options that are counts, and the least of each
_OPTIONS = {
    "local": (),
    "slurm": ("partition", "time", "gpus", "cpus", "cluster"),
    "dask": ("address",),
    "ray": ("address",),
}
CLUSTERS = ("slurm", "local")


def launch(
    launcher: str, options: Sequence[str], workers: int | None, folder: Path
) -> Callable[[], Engine] | None:
    """Returns what starts an engine; None for the processes of this machine.

    Args:
        launcher: One of `LAUNCHERS`.
        options: Of the engine, as ``KEY=VALUE``.
        workers: Jobs that run at a time; None: as the engine has it.
        folder: For files of the engine, which all machines must share.

    Raises:
        ValueError: The engine or Slurm is not installed, or an option is wrong.
    """
    values = checked(launcher, options)
    if launcher == "local":
        return None
    from biasshift.training import clusters

    if launcher == "slurm":
        return partial(clusters.Slurm, workers, folder / "slurm", values)
    kind = clusters.Dask if launcher == "dask" else clusters.Ray
    return partial(kind, workers, values.get("address"))


def checked(launcher: str, options: Sequence[str]) -> dict[str, Any]:
    """Returns the options of an engine by name, with counts as numbers.

    >>> checked("local", [])
    {}

    Raises:
        ValueError: An option is wrong, or the engine or Slurm is not installed.
    """
    known = _OPTIONS[launcher]
    values: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known or not value or key in values:
            remedy = f"KEY=VALUE with {_listed(known)} as KEY, each once" if known else "left out"
            raise ValueError(
                f"--launcher-options of launcher '{launcher}' must be {remedy}, got {option!r}."
            )
        values[key] = _value(key, value)
    if launcher in _NEEDS and find_spec(_NEEDS[launcher][0]) is None:
        raise ValueError(
            f"Launcher '{launcher}' needs {_NEEDS[launcher][1]}. Install it with: "
            f"pip install 'biasshift[{launcher}]'."
        )
    if launcher == "slurm" and values.get("cluster", "slurm") == "slurm" and not which("sbatch"):
        raise ValueError(
            "Launcher 'slurm' needs Slurm's sbatch, which is not on this machine. Give the command "
            "where jobs are submitted, or try it here with --launcher-options cluster=local."
        )
    return values


def _value(key: str, value: str) -> Any:
    if key == "cluster" and value not in CLUSTERS:
        raise ValueError(f"--launcher-options cluster must be {_listed(CLUSTERS)}, got {value!r}.")
    if key not in _COUNTS:
        return value
    if not (value.isascii() and value.isdigit() and int(value) >= _COUNTS[key]):
        unit = " of minutes" if key == "time" else ""
        raise ValueError(
            f"--launcher-options {key} must be a whole number{unit} of at least {_COUNTS[key]}, "
            f"got {value!r}."
        )
    return int(value)


def _listed(words: Sequence[str]) -> str:
    *others, end = words
    return f"{', '.join(others)} or {end}" if others else end
