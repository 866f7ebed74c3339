"""The promises of docs/promises.md, each at a few faults: `make faults` tries many."""

import os
import re
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch

from biasshift.atomic import replacing
from biasshift.runs.integrity import UncheckedRunWarning
from biasshift.runs.reader import read_run, run_states
from biasshift.runs.writer import Run
from tests.faults import kills, mutations, writers
from tests.faults.alone import run_alone, server
from tests.faults.tally import Tally

pytestmark = pytest.mark.timeout(600)  # on a machine that is busy with something else
OLD = Path(__file__).parents[1] / "version_0_1" / "interrupted-plain"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_none_lost(tallies: list[Tally], least: int) -> None:
    lost = [f"{tally.kind}: {loss}" for tally in tallies for loss in tally.lost]
    assert not lost, "\n".join(lost)
    assert sum(tally.tried for tally in tallies) >= least


def test_damaged_files_are_refused_or_read_as_they_were(tmp_path):
    tallies = mutations.tallies(20, 1, tmp_path)
    assert_none_lost(tallies, 120)
    assert all(tally.refused for tally in tallies), "every kind of file has a checksum"


def test_a_killed_ensemble_is_resumed_to_the_same_bits(tmp_path):
    run_alone("kills", 2, tmp_path)


def test_a_full_disk_costs_no_more_than_a_resumption(tmp_path):
    run_alone("full_disk", 2, tmp_path)


def test_a_folder_has_one_writer(tmp_path):
    assert_none_lost(writers.tallies(1, 4, tmp_path), 4)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_neither_writes_its_parents_run_nor_keeps_its_lock(tmp_path):
    assert writers.forked(tmp_path / "run") == []


# -- that the programs find faults -------------------------------------------------------------


def test_readers_without_checksums_are_found(tmp_path):
    """Or the test above would not say much."""
    with mock.patch("biasshift.runs.reader.file_digest", lambda file: _listed(Path(file.name))):
        tallies = mutations.tallies(40, 1, tmp_path, part="segment")
    assert tallies[0].lost


def _listed(path: Path) -> str:
    """The checksum that a segment should have, whatever it has."""
    from biasshift.runs.state import read_state

    digests = read_state(path.parent).segments
    number = int(re.findall(r"\d+", path.name)[0])
    return digests[number] if number < len(digests) else ""


def test_checkpoints_that_are_replaced_one_by_one_are_found(tmp_path):
    """Members of a killed ensemble are resumed apart then, and end at other numbers."""
    with mock.patch("biasshift.training.runner.starts", _each_for_itself):
        context, (expected, moments) = server(), kills.whole(tmp_path / "whole")
        how = "with weights"
        names = moments[how]
        first = next(i for i, name in enumerate(names) if name == "inside torch.save")
        point = names.index("inside torch.save", first + 1)  # of the second member
        fault = kills._end(context, tmp_path / "killed", [point], how, expected[how])
    assert fault.startswith("differs")


def _each_for_itself(members):
    return [member.checkpoints[-1] if member.checkpoints else None for member in members]


# -- files -------------------------------------------------------------------------------------


def test_a_planted_link_is_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".state.json.tmp", ".config.json.tmp", ".segment-00000.parquet.tmp"):
        (folder / name).symlink_to(outside)
    with Run.create(folder, {}) as run:
        run.append(pd.DataFrame({"step": [0]}))
    assert outside.read_text() == "mine" and len(read_run(folder)) == 1
    assert not list(folder.glob(".*"))


def test_a_planted_lock_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(outside)
    with pytest.raises(FileExistsError, match=r"lock' must be an ordinary file"):
        Run.create(tmp_path / "run", {})
    assert outside.read_text() == "mine"


def test_what_dead_processes_have_left_is_removed_and_nothing_else(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        name = temporary.name
    dead = tmp_path / name.replace(f"-{os.getpid()}-", "-999999999-")
    alive, elsewhere = (
        tmp_path / name,
        tmp_path / re.sub(r"[0-9a-f]{8}-\d", "00000000-9", dead.name),
    )
    for path in (dead, alive, elsewhere):
        path.write_text("half")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("newer")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", alive.name, elsewhere.name}


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with (
        pytest.raises(FileNotFoundError, match="Nothing was written"),
        replacing(tmp_path / "a.txt"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_the_folder_is_synced_behind_the_renaming(tmp_path):
    calls: list[str] = []
    real = {"fsync": os.fsync, "replace": os.replace}

    def fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real["fsync"](descriptor)

    def rename(*names) -> None:
        calls.append("replace")
        real["replace"](*names)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "replace", rename):
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
    assert calls == ["file", "replace", "folder"]


# -- runs of before ----------------------------------------------------------------------------


def test_a_run_without_checksums_is_read_with_one_warning(tmp_path):
    for read in (read_run, run_states):
        with pytest.warns(UncheckedRunWarning, match="interrupted-plain") as warned:
            read(OLD)
        assert len(warned) == 1


def test_a_run_that_has_had_checksums_cannot_lose_them(tmp_path):
    with Run.create(tmp_path / "run", {"seed": 0}) as run:
        run.append(pd.DataFrame({"step": [0]}))
    (tmp_path / "run" / "state.json").write_text('{"state": "finished", "last_step": 0}')
    for read in (read_run, run_states):
        with pytest.raises(ValueError, match=r"state\.json' has lost its checksums"):
            read(tmp_path / "run")
    with pytest.raises(ValueError, match=r"state\.json' has lost its checksums"):
        Run.resume(tmp_path / "run", {"seed": 0}, 1)
