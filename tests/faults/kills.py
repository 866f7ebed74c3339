"""A training of an ensemble that is killed at a chosen moment, and resumed: its results are those
of one that was not, to the bit.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from biasshift.runs.reader import read_runs, run_states
from tests.faults.alone import server
from tests.faults.points import Points, kill, watching
from tests.faults.small import KEEP, members, result, same, train
from tests.faults.tally import Tally

EXECUTIONS = {"with weights": KEEP, "without": replace(KEEP, keep_weights=False)}
PARTS = list(EXECUTIONS)
PATIENCE = 120  # seconds


def killed(out: Path, point: int, how: str) -> None:
    """What the process does that is killed."""
    torch.set_num_threads(1)
    with watching(Points(point, kill)):
        train(out, execution=EXECUTIONS[how])


def whole(work: Path, part: str | None = None) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """What undisturbed trainings of each kind, or of one, bring, and the moments that they pass."""
    results, moments = {}, {}
    for how in PARTS if part is None else [part]:
        with watching(Points()) as points:
            train(work / how, execution=EXECUTIONS[how])
        results[how], moments[how] = result(work / how, EXECUTIONS[how]), points.passed
    return results, moments


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """Kills at ``count`` moments of each kind of training, or of one, and others while resuming.

    Of these there are a third as many. There are some 330 moments.
    """
    chance, context = random.Random(f"{seed} {part}"), server()
    expected, moments = whole(work / "whole", part)
    made = []
    for how, passed in moments.items():
        some = sorted(chance.sample(range(len(passed)), min(count, len(passed))))
        once, twice = Tally(f"kill, {how}"), Tally(f"kill, and another while resuming, {how}")
        for tally, second in ((once, False), (twice, True)):
            for point in some[::3] if second else some:
                points = [point, chance.randrange(len(passed))] if second else [point]
                fault = _end(context, work / "killed", points, how, expected[how])
                if fault:
                    tally.lost.append(f"{[passed[p] for p in points]} at {points}: {fault}")
                else:
                    tally.unharmed += 1
        made += [once, twice]
    return made


def _end(context: Any, out: Path, points: Sequence[int], how: str, expected: list[Any]) -> str:
    """What went wrong; "" where nothing did."""
    shutil.rmtree(out, ignore_errors=True)
    for point in points:
        process = context.Process(target=killed, args=(out, point, how))
        process.start()
        process.join(PATIENCE)
        if process.exitcode not in (-9, 0):  # a resumed training passes fewer moments
            process.kill()
            return f"ended with {process.exitcode}"
        runs = [folder for folder in members(out) if (folder / "config.json").exists()]
        try:
            if runs:
                read_runs(*runs), run_states(*runs)
        except ValueError as error:
            return f"cannot be read: {error}"
    try:
        train(out, execution=EXECUTIONS[how])
        ended = result(out, EXECUTIONS[how])
    except Exception as error:
        return f"cannot be resumed: {error}"
    # A finished run is not touched any more: the file of its lock may stay.
    left = sorted(path.name for path in out.glob("*/.*") if path.name != ".lock")
    return "" if same(ended, expected) and not left else f"differs, or leaves {left}"
