"""Several processes that want to write one run folder: one does, the others are told who."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

from biasshift.runs import ownership
from biasshift.runs.reader import read_run, run_states
from biasshift.runs.writer import Run
from tests.faults.alone import server
from tests.faults.tally import Tally

PARTS = ["locks", "names of owners"]
PATIENCE = 120  # seconds


def no_locks(descriptor: int, how: int) -> None:
    """What a network file system without locks answers."""
    raise OSError(errno.ENOLCK, "No locks available")


def write(folder: Path, number: int, locks: bool, begun: Any, told: Any, seconds: float) -> None:
    """Replaces the run and writes it for a while; says how that ended."""
    begun.wait(PATIENCE)
    with mock.patch.object(ownership.fcntl, "flock", ownership.fcntl.flock if locks else no_locks):
        try:
            with Run.create(folder, {"seed": number}, "replace") as run:
                end, step = time.monotonic() + seconds, 0
                while time.monotonic() < end or step < 3:
                    run.append(pd.DataFrame({"step": [step], "writer": [float(number)]}))
                    run.flush()
                    step += 1
            told.put((number, os.getpid(), step, ""))
        except Exception as error:
            told.put((number, os.getpid(), 0, f"{type(error).__name__}: {error}"))


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """``count`` races of three processes for one folder, and as many owners that are killed.

    They are told by locks, by names, or by one of both.
    """
    chance, context = random.Random(f"{seed} {part}"), server()
    made = []
    for name in PARTS if part is None else [part]:
        locks = name == "locks"
        races, deaths = Tally(f"three writers at once, {name}"), Tally(f"killed owner, {name}")
        for number in range(count):
            folder = work / f"{name}-{number}"
            for tally, fault in (
                (races, _race(context, folder, locks, chance)),
                (deaths, _death(context, folder, locks)),
            ):
                if fault:
                    tally.lost.append(fault)
                else:
                    tally.refused += 1
        made += [races, deaths]
    return made


def _race(context: Any, folder: Path, locks: bool, chance: random.Random) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    begun, told = context.Event(), context.Queue()
    seconds = chance.uniform(0.5, 1.0)
    processes = [
        context.Process(target=write, args=(folder, number, locks, begun, told, seconds))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    begun.set()
    answers = [told.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
    written = {number: steps for number, _, steps, error in answers if not error}
    for _, _, _, error in answers:
        if error and "is being written by" not in error:
            return error
    if not written:
        return "nobody wrote"
    table = read_run(folder)  # of the last, where one came after the other
    last = int(table["seed"].iloc[0])
    whole = table["step"].tolist() == list(range(written.get(last, -1)))
    alone = (table["writer"] == last).all() and run_states(folder)["state"].tolist() == ["finished"]
    return "" if whole and alone else f"mixed: {answers}"


def _death(context: Any, folder: Path, locks: bool) -> str:
    """A second writer is told the owner's number, and takes over once that is killed."""
    shutil.rmtree(folder, ignore_errors=True)
    begun, told = context.Event(), context.Queue()
    begun.set()
    owner = context.Process(target=write, args=(folder, 0, locks, begun, told, PATIENCE))
    owner.start()
    while not list(folder.glob("segment-00001.parquet")):
        time.sleep(0.01)
    with mock.patch.object(ownership.fcntl, "flock", ownership.fcntl.flock if locks else no_locks):
        try:
            with Run.create(folder, {"seed": 1}, "replace"):
                return "two writers"
        except FileExistsError as error:
            if f"by process {owner.pid}." not in str(error):
                return str(error)
        os.kill(owner.pid, signal.SIGKILL)
        owner.join(PATIENCE)
        with Run.create(folder, {"seed": 1}, "replace") as run:
            run.append(pd.DataFrame({"step": [0], "writer": [1.0]}))
    return "" if read_run(folder)["writer"].tolist() == [1.0] else "mixed"


def forked(folder: Path) -> list[str]:
    """What a forked child may do with its parent's run, and whether the lock outlives the parent.

    Returns the faults.
    """
    faults = []
    context = multiprocessing.get_context("fork")
    told = context.Queue()

    def child(run: Run) -> None:
        try:
            run.append(pd.DataFrame({"step": [1]}))
            run.flush()
            told.put("wrote")
        except RuntimeError as error:
            told.put(str(error))
        time.sleep(1)  # longer than the parent has the run

    with Run.create(folder, {"seed": 0}) as run:
        run.append(pd.DataFrame({"step": [0]}))
        run.flush()
        process = context.Process(target=child, args=(run,))
        process.start()
        answer = told.get(timeout=PATIENCE)
        if "belongs to process" not in answer:
            faults.append(answer)
    with Run.create(folder, {"seed": 1}, "replace"):
        pass
    process.join(PATIENCE)
    if len(read_run(folder)):
        faults.append("rows of the child")
    return faults
