"""Files of run folders that change on the disk: nothing that is read afterwards may differ."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from biasshift.runs.reader import read_run, run_states
from biasshift.runs.state import read_state, write_state
from biasshift.training.checkpoint import found, prepare
from biasshift.training.trial_run import KEPT
from tests.faults.small import content, members, same, train
from tests.faults.tally import Tally

KINDS = {
    "config.json": "config.json",
    "provenance.json": "provenance.json",
    "state.json": "state.json",
    "segment": "segment-*.parquet",
    "checkpoint.pt": "checkpoint.pt",
    "checkpoint.next.pt": "checkpoint.next.pt",
}
PARTS = list(KINDS)


def interrupted(out: Path) -> Path:
    """Two members that were interrupted behind their second checkpoint, and have a next one."""

    def stop(report: Any) -> None:
        if report.step > 6:
            raise KeyboardInterrupt

    try:
        train(out, "refuse", stop)
    except KeyboardInterrupt:
        pass
    _add_next(out)
    return out


def _add_next(out: Path) -> None:
    """As a kill leaves it between the first half of a checkpoint and the second."""
    for folder in members(out):
        state = read_state(folder)
        present = found(folder, KEPT, state)[0]
        sha256 = prepare(folder, {**present.state, "step": 9})
        write_state(folder, replace(state, checkpoints=(present.sha256, sha256)))


# -- the changes -------------------------------------------------------------------------------


def flip(chance: random.Random, path: Path, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(chance: random.Random, path: Path, others: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def zero(chance: random.Random, path: Path, others: list[Path]) -> None:
    """A block, as a disk does."""
    data = bytearray(path.read_bytes())
    size = chance.choice([1, 16, 512, 4096])
    start = chance.randrange(len(data)) // size * size
    block = data[start : start + size]
    data[start : start + size] = bytes(len(block))
    path.write_bytes(data)


def append(chance: random.Random, path: Path, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.choice([1, 8, 1000])))


def swap(chance: random.Random, path: Path, others: list[Path]) -> None:
    other = chance.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def overwrite(chance: random.Random, path: Path, others: list[Path]) -> None:
    path.write_bytes(chance.choice(others).read_bytes())


def duplicate(chance: random.Random, path: Path, others: list[Path]) -> None:
    """Under the name of a file that is not there, as far as there is one."""
    taken = {other.name for other in path.parent.iterdir()}
    free = [name for number in range(99) if (name := f"segment-{number:05d}.parquet") not in taken]
    names = {free[0], free[1], "checkpoint.pt", "checkpoint.next.pt"} - {path.name}
    shutil.copyfile(path, path.with_name(chance.choice(sorted(names))))


def delete(chance: random.Random, path: Path, others: list[Path]) -> None:
    path.unlink()


def shuffle_bytes(chance: random.Random, path: Path, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    part = list(data[start : start + 32])
    chance.shuffle(part)
    data[start : start + 32] = bytes(part)
    path.write_bytes(data)


CHANGES: list[Callable[[random.Random, Path, list[Path]], None]] = [
    flip, flip, flip, truncate, zero, append, swap, overwrite, duplicate, delete, shuffle_bytes,
]  # fmt: skip


# -- what follows ------------------------------------------------------------------------------


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """``count`` changes of each kind of file, or of one kind."""
    chance, whole = random.Random(f"{seed} {part}"), interrupted(work / "whole")
    expected = [content(folder) for folder in members(whole)]
    assert all(len(kept) == 2 for *_, kept in expected), "both checkpoints are there"
    return [
        _tally(kind, pattern, count, chance, whole, expected, work / "changed")
        for kind, pattern in KINDS.items()
        if part in (None, kind)
    ]


def _tally(
    kind: str,
    pattern: str,
    count: int,
    chance: random.Random,
    whole: Path,
    expected: list[Any],
    changed: Path,
) -> Tally:
    tally = Tally(f"damage to {kind}")
    for _ in range(count):
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(whole, changed)
        path = chance.choice(sorted(changed.glob(f"*/{pattern}")))
        every = sorted(other for other in changed.glob("*/*") if other != path)
        alike = [other for other in every if other.suffix == path.suffix]
        change = chance.choice(CHANGES)
        change(chance, path, alike if chance.random() < 0.8 else every)
        outcomes = [
            _outcome(folder, wanted)
            for folder, before, wanted in zip(
                members(changed), members(whole), expected, strict=True
            )
            if _files(folder) != _files(before)
        ]
        if bad := [outcome for outcome in outcomes if outcome not in ("same", "refused")]:
            tally.lost.append(f"{change.__name__} {path.relative_to(changed)}: {bad[0]}")
        elif "refused" in outcomes:
            tally.refused += 1
        else:
            tally.unharmed += 1
    return tally


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _outcome(folder: Path, expected: list[Any]) -> str:
    """Rows, state and checkpoints of one run: each is refused, or the same."""
    outcome = "same"
    for part, wanted in zip(_parts(folder), expected, strict=True):
        try:
            value = part()
        except ValueError as error:
            message = str(error)
            named = str(folder) in message and "\n" not in message and message.endswith(".")
            if not named:
                return f"unclear: {message}"
            outcome = "refused"
            continue
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        # A next checkpoint that is damaged counts as not written: the present one is whole.
        alike = same(value, wanted) or (part.__name__ == "kept" and same(value, wanted[:1]))
        if not alike:
            return f"other {part.__name__}"
    return outcome


def _parts(folder: Path) -> list[Callable[[], Any]]:
    def states() -> Any:
        return run_states(folder)

    def kept() -> Any:
        return [checkpoint.state for checkpoint in found(folder, KEPT, read_state(folder))]

    def table() -> Any:
        return read_run(folder)

    return [table, states, kept]
