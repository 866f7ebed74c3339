"""From an experiment's options to run folders, and what is said of them at the end."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from biasshift.cli.console import (
    progress,
    say_comparison,
    say_identities,
    say_paths,
    say_runs,
    say_sweep,
    say_verdicts,
    sentence,
)
from biasshift.distributed import is_distributed, process_group, rank, under_torchrun
from biasshift.experiments.experiment import Experiment
from biasshift.figures import draw, read
from biasshift.runs.reader import run_states
from biasshift.runs.schema import is_run, read_config
from biasshift.runs.writer import Run
from biasshift.training.loop import Diverged
from biasshift.training.process_pool import cores, run_jobs
from biasshift.training.runner import run
from biasshift.training.trial import Report

Group = list[Any]  # of settings that one job trains


def train(console: Console, experiment: Experiment) -> None:
    """Trains all runs of an experiment, then shows what they say: table, identities, figures,
    claims.

    Runs that are finished stay so, whatever cannot be said or drawn of them: a sentence tells why
    not.

    Raises:
        ValueError: for options that do not fit, or folders that hold something else.
    """
    settings = experiment.settings()
    if not settings:  # an array of jobs may be wider than the grid
        console.print("No runs fall to this part: there are more parts than runs.")
        return
    folders = [experiment.folder(setting) for setting in settings]
    device = experiment.where()
    with process_group(device):
        if rank() == 0:
            _refuse_taken(folders, settings, experiment)
        _prepare(experiment, device)
        groups = _grouped(experiment, settings)
        workers = _workers(experiment, groups, device)
        if rank() == 0:
            experiment.out.mkdir(parents=True, exist_ok=True)
            _announce(console, experiment, len(settings), workers, device)
        _work(console, experiment, groups, workers)
        if rank() == 0:
            _say(console, experiment, folders)


def _prepare(experiment: Experiment, device: torch.device) -> None:
    """Wrong data is found here, once, before any process is started."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _data(experiment)


def _workers(experiment: Experiment, groups: list[Group], device: torch.device) -> int:
    if under_torchrun():
        return 1
    usual = cores() if device.type == "cpu" else 1
    return min(experiment.workers or usual, len(groups)) if experiment.small else 1


def _grouped(experiment: Experiment, settings: list[Any]) -> list[Group]:
    if not experiment.ensemble:
        return [[setting] for setting in settings]
    groups: dict[Any, Group] = {}
    for setting in settings:
        groups.setdefault(experiment.alike(setting), []).append(setting)
    return list(groups.values())


def _announce(
    console: Console, experiment: Experiment, runs: int, workers: int, device: torch.device
) -> None:
    processes = f"{workers} process{'es' if workers > 1 else ''}"
    console.print(
        f"{runs} run{'s' if runs > 1 else ''} on {device} in {processes} → {experiment.out}",
        soft_wrap=True,
    )


def _work(console: Console, experiment: Experiment, groups: list[Group], workers: int) -> None:
    if rank() > 0:
        for group in groups:
            _run(experiment, group, lambda report: None)
        return
    data = _data(experiment)
    total = sum(experiment.trial(group[0], data).steps * len(group) for group in groups[:1]) * len(
        groups
    )
    with progress(console, max(total, 1)) as report:
        if experiment.small and not is_distributed():
            run_jobs([(_run, (experiment, group)) for group in groups], workers, report)
        else:  # all cores for one run
            for group in groups:
                _run(experiment, group, report)


@lru_cache(1)
def _data(experiment: Experiment) -> Any:
    return experiment.load()


def _run(experiment: Experiment, group: Group, report: Report) -> None:
    """One job. A diverged run is a result, which its folder keeps: the others go on."""
    folders = [experiment.folder(setting) for setting in group]
    try:
        trials = [experiment.trial(setting, _data(experiment)) for setting in group]
        run(trials, folders, experiment.exist(), report, experiment.execution())
    except Diverged:
        pass
    except RuntimeError as error:
        raise RuntimeError(f"'{folders[0]}': {error}") from error


def _refuse_taken(folders: list[Path], settings: list[Any], experiment: Experiment) -> None:
    for folder, setting in zip(folders, settings, strict=True):
        if not is_run(folder):
            continue
        if experiment.exist() == "refuse":
            raise ValueError(
                f"'{folder}' already holds a run: choose another --out, or give --resume or "
                "--replace."
            )
        if (other := read_config(folder).get("experiment")) != experiment.name:
            raise ValueError(
                f"'{folder}' holds a run of another experiment ('{other}'): choose another --out."
            )
        if experiment.exist() == "resume":
            Run.is_finished(
                folder, setting
            )  # refuses runs of other options: now, and not when the runs before it are trained


def _say(console: Console, experiment: Experiment, folders: list[Path]) -> None:
    table, states = read(*folders), run_states(*folders)
    for name in states[states["state"] == "failed"]["run"]:
        console.print(f"{name}: training diverged; the run ends there.", soft_wrap=True)
    lost = set(states["state"]) == {"failed"}
    if lost or not experiment.figures or not experiment.whole:
        say_runs(console, states, table)
        if not experiment.whole:
            console.print(_when_all_are_done(experiment), soft_wrap=True)
        elif lost:
            console.print("There is nothing to draw or to compare: no run came to its end.")
        return
    with _finished(console, "table"):
        (say_sweep if experiment.sweeps else say_comparison)(console, table)
    with _finished(console, "identities"):
        say_identities(console, table)
    for name in experiment.figures:
        with _finished(console, f"figure {name}"):
            say_paths(console, draw(name, table, experiment.out))
    with _finished(console, "verdicts"):
        say_verdicts(console, table)


def _when_all_are_done(experiment: Experiment) -> str:
    """A part is not judged: what it is compared with may be another job's."""
    out = shlex.quote(str(experiment.out))
    drawn = "".join(
        f", and `biasshift figure {name} {out}` draws them" for name in experiment.figures
    )
    return f"These are a part of the runs: when all parts are done, `biasshift claims {out}` judges them{drawn}."


@contextmanager
def _finished(console: Console, what: str) -> Iterator[None]:
    """Of finished runs: what cannot be said or drawn is told in a sentence, for the training itself
    has not failed.

    Defects of the program are not among it, nor a reader who has seen enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"No {what}: {sentence(error)}", soft_wrap=True)
