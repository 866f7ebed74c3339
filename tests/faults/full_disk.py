"""A disk that is full from some moment on, or for one: the training fails with the system's error,
its folders stay readable, and once there is room, it is resumed to the same results.
"""

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

from biasshift.runs.reader import read_runs, run_states
from tests.faults.kills import EXECUTIONS, whole
from tests.faults.points import Points, full, watching
from tests.faults.small import members, result, same, train
from tests.faults.tally import Tally

PARTS = list(EXECUTIONS)


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """A disk that is full at ``count`` moments of each kind of training, or of one kind."""
    chance = random.Random(f"{seed} {part}")
    expected, moments = whole(work / "whole", part)
    made = []
    for name, length in (("disk full for one write", 1), ("disk full from then on", 10**9)):
        tally = Tally(name)
        for how, passed in moments.items():
            for point in chance.sample(range(len(passed)), min(count, len(passed))):
                fault = _end(work / "full", point, length, how, expected[how])
                if fault:
                    tally.lost.append(f"{passed[point]} at {point}, {how}: {fault}")
                else:
                    tally.unharmed += 1
        made.append(tally)
    return made


def _end(out: Path, point: int, length: int, how: str, expected: list[Any]) -> str:
    """What went wrong; "" where nothing did."""
    shutil.rmtree(out, ignore_errors=True)
    raised = False
    try:
        with watching(Points(point, full, point + length)):
            train(out, execution=EXECUTIONS[how])
    except OSError:
        raised = True
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    runs = [folder for folder in members(out) if (folder / "config.json").exists()]
    try:
        if runs:
            read_runs(*runs), run_states(*runs)
    except ValueError as error:
        return f"cannot be read: {error}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(out, execution=EXECUTIONS[how])
        ended = result(out, EXECUTIONS[how])
    except Exception as error:
        return f"cannot be resumed: {error}"
    return "" if same(ended, expected) else f"differs{'' if raised else ', and nothing was raised'}"
