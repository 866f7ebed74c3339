"""Tries many faults, and prints the table of docs/promises.md: `make faults`."""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from tests.faults.alone import server
from tests.faults.one import tried
from tests.faults.tally import HEADER, Tally, merged

# How many are tried, and of what; no more than MOST, or it takes days.
PROGRAMS = {
    "mutations": (2000, "of each kind of file"),
    "kills": (200, "moments of each kind of training, of some 330"),
    "full_disk": (50, "moments of each kind of training"),
    "writers": (10, "races of each kind"),
    "threads": (50, "rounds of each kind"),
    "interrupts": (1008, "in all"),
    "exceptions": (400, "in all"),
}
MOST = 100_000


def tallies(options: argparse.Namespace) -> Iterator[list[Tally]]:
    """Those of each program, as soon as all of its parts have ended."""
    with ProcessPoolExecutor(options.workers, server(), max_tasks_per_child=1) as pool:
        begun = [
            [
                _submitted(pool, program, part, getattr(options, program), options.seed)
                for part in importlib.import_module(f"tests.faults.{program}").PARTS
            ]
            for program in options.only or PROGRAMS
        ]
        for futures in begun:
            yield merged(tally for future in futures for tally in future.result())


def _submitted(
    pool: ProcessPoolExecutor, program: str, part: str, count: int, seed: int
) -> Future[list[Tally]]:
    """What a part will find; it says so on the terminal when it has ended."""

    def say(future: Future[list[Tally]]) -> None:
        if not future.cancelled() and future.exception() is None:
            found = future.result()
            faults, lost = sum(t.tried for t in found), sum(len(t.lost) for t in found)
            print(f"{program}, {part}: {faults} tried, {lost} lost", file=sys.stderr, flush=True)

    future = pool.submit(tried, program, part, count, seed)
    future.add_done_callback(say)
    return future


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    for program, (count, what) in PROGRAMS.items():
        name = f"--{program.replace('_', '-')}"
        parser.add_argument(name, type=_count, default=count, help=f"{what}; {count} by default")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, help="some of them")
    parser.add_argument("--workers", type=_count, default=1, help="processes; 1 by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, lost = time.monotonic(), list[str]()
    print(HEADER, flush=True)
    for made in tallies(options):
        for tally in made:
            print(tally.row(), flush=True)
            lost += [f"LOST: {tally.kind}: {loss}" for loss in tally.lost]
    print(f"\nSeed {options.seed}, {time.monotonic() - began:.0f} s.", *lost, sep="\n")
    return bool(lost)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"it must be 1 to {MOST:,}, got {text[:20]}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
