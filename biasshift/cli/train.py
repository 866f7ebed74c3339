"""The commands that make runs: from the options of an experiment to run folders and results."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from biasshift.activation_names import is_import_path
from biasshift.cli.console import print_paths, progress
from biasshift.cli.errors import error_message
from biasshift.cli.results import (
    print_comparison,
    print_identities,
    print_next,
    print_sweep,
    print_verdicts,
)
from biasshift.cli.run_list import print_runs
from biasshift.distributed import is_distributed, process_group, rank, under_torchrun
from biasshift.escapes import visible
from biasshift.experiments.experiment import Experiment
from biasshift.figures import draw, read
from biasshift.runs.reader import run_states
from biasshift.runs.schema import LOCK, is_run, read_config, read_json
from biasshift.runs.writer import Run
from biasshift.training.allocator import keep_freed_memory
from biasshift.training.loop import Diverged
from biasshift.training.process_pool import cores, run_jobs
from biasshift.training.runner import run
from biasshift.training.trial import Report

LOCK_SECONDS = 120.0  # after which NFS has given up the locks of a machine that is gone
Job = list[Any]  # the configs that are trained together: one, or those of an ensemble


def run_experiment(console: Console, experiment: Experiment) -> None:
    """Trains all runs of an experiment, then prints table and identities, figures and verdicts.

    Runs that are finished stay so, whatever of them cannot be printed or drawn: a sentence gives
    the reason.

    Raises:
        ValueError: Options do not fit together, or folders hold something else.
        RuntimeError: A run failed for another reason than divergence; the message names its folder.
    """
    _find_modules_here(experiment)
    configs = experiment.configs()
    if not configs:  # an array of jobs may be wider than the grid
        console.print("This part has no runs: there are more parts than runs.")
        return
    folders = [experiment.folder(config) for config in configs]
    device = experiment.where()
    with process_group(device):
        if rank() == 0:
            _refuse_taken(experiment, configs, folders)
            _refuse_unnamed(experiment)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif not experiment.small:
            keep_freed_memory()  # page faults are a third of a step's time otherwise
        _data(experiment)  # wrong data is found here, once, before any process is started
        jobs = _jobs(experiment, configs)
        workers = _workers(experiment, len(jobs), device)
        if rank() == 0:
            experiment.out.mkdir(parents=True, exist_ok=True)
            runs = f"{len(configs)} run{'s' if len(configs) > 1 else ''}"
            where = f"on {device} in {workers} process{'es' if workers > 1 else ''}"
            if experiment.launch():  # its machines may have other devices
                where = f"by {vars(experiment)['launcher']}"
            console.print(f"{runs} {where} → {visible(str(experiment.out))}", soft_wrap=True)
        _work(console, experiment, jobs, workers)
        if rank() == 0:
            _print_results(console, experiment, folders)


def _refuse_taken(experiment: Experiment, configs: list[Any], folders: list[Path]) -> None:
    for config, folder in zip(configs, folders, strict=True):
        if not is_run(folder):
            continue
        if experiment.exist() == "refuse":
            raise ValueError(
                f"'{folder}' already holds a run. Choose another --out, or give --resume or "
                "--replace."
            )
        if (other := read_config(folder).get("experiment")) != experiment.name:
            raise ValueError(
                f"'{folder}' holds a run of another experiment ('{other}'). Choose another --out."
            )
        if experiment.exist() == "resume":
            # Refuses runs of other options: now, and not when the runs before it are trained.
            Run.is_finished(folder, config)


def _refuse_unnamed(experiment: Experiment) -> None:
    """An unfinished run whose activation function is an import path is resumed only by name: what a
    folder records is never imported.
    """
    out = experiment.out
    if experiment.exist() != "resume" or not out.is_dir():
        return
    named = vars(experiment).get("activation", ())
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        recorded = _unfinished_activation(experiment, folder)
        if is_import_path(recorded) and recorded not in named:
            raise ValueError(
                f"'{folder}' is an unfinished run whose activation is imported only when you name "
                f"it. Give --activation {recorded}, or another --out."
            )


def _unfinished_activation(experiment: Experiment, folder: Path) -> Any:
    """What an unfinished run of the experiment records; None of any other folder."""
    try:
        config = read_config(folder) if is_run(folder) else {}
        state = read_json(folder, "state.json", {}).get("state", "running")
    except (ValueError, OSError):  # damaged: no run of this command, or refused before
        return None
    unfinished = state in ("running", "interrupted")
    return (
        config.get("activation")
        if unfinished and config.get("experiment") == experiment.name
        else None
    )


def _find_modules_here(experiment: Experiment) -> None:
    """Lets an import path that was named be found in the current folder, behind all others."""
    named = vars(experiment).get("activation", ())
    here = str(Path.cwd())
    if any(map(is_import_path, named)) and not sys.flags.safe_path and here not in sys.path:
        sys.path.append(here)


def _jobs(experiment: Experiment, configs: list[Any]) -> list[Job]:
    jobs: dict[Any, Job] = {}
    for position, config in enumerate(configs):
        key = experiment.alike(config) if experiment.ensemble else position
        jobs.setdefault(key, []).append(config)
    return list(jobs.values())


def _workers(experiment: Experiment, jobs: int, device: torch.device) -> int:
    if under_torchrun() or not experiment.small:
        return 1
    usual = cores() if device.type == "cpu" else 1
    return min(experiment.workers or usual, jobs)


def _work(console: Console, experiment: Experiment, jobs: list[Job], workers: int) -> None:
    if rank() > 0:
        for job in jobs:
            run_job(experiment, job, lambda report: None)
        return
    steps = experiment.trial(jobs[0][0], _data(experiment)).steps * sum(map(len, jobs))
    with progress(console, max(steps, 1)) as report:
        if experiment.small and not is_distributed():
            launch = experiment.launch()
            sent, patience = (experiment.sent(), LOCK_SECONDS) if launch else (experiment, 0.0)
            run_jobs(
                [
                    (partial(run_job, before=_origins(sent, job), patience=patience), (sent, job))
                    for job in jobs
                ],
                workers,
                report,
                launch,
            )
        else:  # all cores for one run
            for job in jobs:
                run_job(experiment, job, report)


@lru_cache(1)
def _data(experiment: Experiment) -> Any:
    return experiment.load()


def run_job(
    experiment: Experiment,
    configs: Job,
    report: Report,
    before: list[bytes] | None = None,
    patience: float = 0.0,
) -> None:
    """Trains the runs of one job, in this process.

    A diverged run is a result, which its folder keeps: the other jobs continue.

    Args:
        configs: One config, or those that train together as an ensemble.
        report: Called with the progress of each run.
        before: What `_origins` returned before the job began for the first time. Whatever is to be
            done about runs that were there, those that an earlier attempt has begun are resumed.
        patience: Seconds to wait for a folder that another process seems to write.

    Raises:
        RuntimeError: A run failed; the message names its folder.
    """
    folders = [experiment.folder(config) for config in configs]
    exist = experiment.exist()
    if before is not None and _begun(before, _origins(experiment, configs)):
        exist = "resume"
    end = time.monotonic() + patience
    try:
        while True:
            trials = [experiment.trial(config, _data(experiment)) for config in configs]
            try:
                run(trials, folders, exist, report, experiment.execution())
                return
            except FileExistsError:
                locked = any(os.path.lexists(folder / LOCK) for folder in folders)
                if not locked or time.monotonic() > end:
                    raise
            time.sleep(1.0)  # the file system may not know yet that the other's machine is gone
    except Diverged:
        pass
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise RuntimeError(f"The run '{folders[0]}' failed: {reason}.") from error


def _origins(experiment: Experiment, configs: Job) -> list[bytes]:
    """What tells the present run in each folder from a later one; nothing where there is none."""
    paths = [experiment.folder(config) / "provenance.json" for config in configs]
    return [path.read_bytes() if path.is_file() else b"" for path in paths]


def _begun(before: list[bytes], now: list[bytes]) -> bool:
    """Whether an earlier attempt of a job has begun all its runs: none is the one from before."""
    stay = any(one and one == other for one, other in zip(before, now, strict=True))
    return any(now) and not stay


# -- results ---------------------------------------------------------------------------------------


def _print_results(console: Console, experiment: Experiment, folders: list[Path]) -> None:
    table, states = read(*folders), run_states(*folders)
    for name in states[states["state"] == "failed"]["run"]:
        console.print(f"{visible(name)}: training diverged; the run ends there.", soft_wrap=True)
    diverged = set(states["state"]) == {"failed"}
    if diverged or not (experiment.whole and experiment.figures):
        print_runs(console, states, table)
        if not experiment.whole:
            console.print(_part_note(experiment), soft_wrap=True)
        elif diverged:
            console.print("There is nothing to draw or to compare: all runs diverged.")
        return
    with _reported(console, "table"):
        (print_sweep if experiment.sweeps else print_comparison)(console, table)
    with _reported(console, "verdicts"):
        print_verdicts(console, table)
    with _reported(console, "identities"):
        print_identities(console, table)
    for name in experiment.figures:
        with _reported(console, f"figure {name}"):
            print_paths(console, draw(name, table, experiment.out))
    print_next(console, experiment.out)


def _part_note(experiment: Experiment) -> str:
    """A part is not judged: what it is compared with may be another job's."""
    out = shlex.quote(str(experiment.out))
    draws = [f", and `biasshift figure {name} {out}` draws them" for name in experiment.figures]
    return (
        f"These are a part of the runs: when all parts are done, `biasshift claims {out}` judges "
        f"them{''.join(draws)}."
    )


@contextmanager
def _reported(console: Console, part: str) -> Iterator[None]:
    """Prints in a sentence why a part of the results is missing: the training has not failed.

    Defects of the program are raised, as is that nobody reads the output.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"No {part}: {error_message(error)}", soft_wrap=True)
