"""Many seeds, in several processes, kept as lines of JSON that a later call goes on from."""

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .examination import BAD, VERDICTS, examine

Line = dict[str, Any]  # an `Outcome`


def run(seeds: Iterable[int], file: Path | None, workers: int) -> tuple[list[Line], bool]:
    """Examines all seeds that the file does not hold yet.

    Returns:
        The outcomes of the seeds, and whether all of them are there: Ctrl-C ends it early.
    """
    wanted = list(seeds)
    done = {} if file is None else read(file)
    missing = [seed for seed in wanted if seed not in done]
    finished = True
    try:
        with closing(examined(missing, workers)) as outcomes:
            for i, outcome in enumerate(outcomes):
                done[outcome["seed"]] = outcome
                if file is not None:
                    append(file, outcome)
                if outcome["verdict"] in VERDICTS[:4]:
                    print(outcome["seed"], *outcome["findings"][:2], sep="  ", flush=True)
                if i % 100 == 99:
                    print(f"{i + 1} of {len(missing)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        finished = False
    return [done[seed] for seed in wanted if seed in done], finished


def examined(seeds: list[int], workers: int) -> Iterator[Line]:
    """Yields outcomes as they come."""
    if workers <= 1:
        for seed in seeds:
            yield one(seed)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start, maxtasksperchild=500) as pool:
        yield from pool.imap_unordered(one, seeds, chunksize=4)


def one(seed: int) -> Line:
    """The outcome of one seed; an error of the fuzzer itself is one too."""
    try:
        return examine(seed).as_dict()
    except Exception as error:
        text = f"the fuzzer: {type(error).__name__}: {str(error)[:300]}"
        return {"seed": seed, "verdict": "invalid", "findings": [text]}


def _start() -> None:
    """A worker has one thread, and leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


# -- the file --------------------------------------------------------------------------------------


def append(file: Path, outcome: Line) -> None:
    """Adds one line by a single write; a line that was cut before it is ended first."""
    text = json.dumps(outcome, ensure_ascii=False) + "\n"
    with open(file, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                text = "\n" + text
        f.write(text.encode())
        f.flush()


def read(file: Path) -> dict[int, Line]:
    """The outcomes in a file, by seed; lines that were cut are left out."""
    done: dict[int, Line] = {}
    if file.exists():
        for line in file.read_bytes().split(b"\n"):
            try:
                outcome = json.loads(line)
                if outcome["verdict"] in VERDICTS:
                    done[int(outcome["seed"])] = outcome
            except (ValueError, KeyError, TypeError):
                continue
    return done


# -- the summary -----------------------------------------------------------------------------------


def summary(outcomes: list[Line]) -> str:
    """A table of verdicts, what was measured, and the first seeds of everything that is bad."""
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    lines = [f"{len(outcomes)} models"]
    for verdict in VERDICTS:
        seeds = [o["seed"] for o in outcomes if o["verdict"] == verdict]
        shown = "" if verdict in ("right", "refused") else f"  {seeds[:12]}" if seeds else ""
        lines.append(f"  {verdict:<12}{verdicts[verdict]:>7}{shown}")
    layers, measured, checks = (
        sum(o.get(key, 0) for o in outcomes) for key in ("layers", "measured", "checks")
    )
    share = f"{measured / layers:.2%}" if layers else "none"
    lines.append(f"  layers {layers}, measured {measured} ({share}); arrays compared: {checks}")
    seconds = sum(o.get("seconds", 0.0) for o in outcomes)
    lines.append(f"  {seconds:.0f} s of one core, {seconds / max(1, len(outcomes)):.2f} s a model")
    return "\n".join(lines)


__all__ = ["BAD", "append", "one", "read", "run", "summary"]
