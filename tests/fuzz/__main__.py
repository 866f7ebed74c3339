"""``python -m tests.fuzz --models 10000 --seed 0 --resume FILE --workers 2``."""

import argparse
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from .campaign import run, summary


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--models", type=int, default=1000, help="how many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument(
        "--resume", type=Path, help="JSON lines, one per seed; those there are kept"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    outcomes, finished = run(
        range(options.seed, options.seed + options.models), options.resume, options.workers
    )
    print(summary(outcomes))
    if not finished:
        print("Interrupted. Give the same command again, with --resume FILE, to go on.")
        return 130
    return int(any(outcome["verdict"] in ("WRONG", "CRASHED", "DISTURBED") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
