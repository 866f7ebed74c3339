"""Tries many faults on run folders, and prints the table of docs/promises.md: `make faults`."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tests.faults import full_disk, kills, mutations, writers
from tests.faults.tally import HEADER, Tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--mutations", type=int, default=340, help="of each kind of file")
    parser.add_argument("--kills", type=int, help="moments; without, all")
    parser.add_argument("--full-disk", type=int, help="moments; without, all")
    parser.add_argument("--writers", type=int, default=20, help="races of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, tallies = time.monotonic(), list[Tally]()
    print(HEADER, flush=True)
    for module, count in (
        (mutations, options.mutations),
        (kills, options.kills),
        (full_disk, options.full_disk),
        (writers, options.writers),
    ):
        with tempfile.TemporaryDirectory() as work:
            made = module.tallies(count, options.seed, Path(work))
        for tally in made:
            print(tally.row(), flush=True)
        tallies += made
    print(f"\nSeed {options.seed}, {time.monotonic() - began:.0f} s.")
    for tally in tallies:
        for loss in tally.lost:
            print(f"LOST: {tally.kind}: {loss}")
    return any(tally.lost for tally in tallies)


if __name__ == "__main__":
    raise SystemExit(main())
