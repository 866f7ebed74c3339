"""Runs in parallel: they count, they fail together, and nothing outlives a Ctrl-C or a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from biasshift.runs.reader import run_states
from biasshift.runs.writer import Run
from biasshift.training import process_pool
from biasshift.training.process_pool import run_jobs

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds, for a machine that is busy with something else


# -- jobs: functions of this module, because workers import them -----------------------------------


def count(folder: Path, name: str, reports: int, report) -> None:
    for number in range(reports):
        report((name, number))
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def fail(folder: Path, report) -> None:
    wait_for(folder / "linger" / "config.json")
    raise ValueError("this job was planted to fail")


def linger(folder: Path, name: str, report) -> None:
    """A run that ends only when it is interrupted."""
    with Run.create(folder / name, {"seed": 0}):
        (folder / f"{name}.pid").write_text(str(os.getpid()))
        time.sleep(2 * PATIENCE)


def flood(folder: Path, report) -> None:
    """More reports than anybody can count, from the first to the last moment."""
    with Run.create(folder / "flood", {"seed": 0}):
        (folder / "flood.pid").write_text(str(os.getpid()))
        while True:
            report(None)


def fail_in_the_flood(folder: Path, report) -> None:
    wait_for(folder / "flood.pid")
    time.sleep(0.5)
    raise ValueError("this job was planted to fail")


def cling(folder: Path, report) -> None:
    """A job that ignores signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    linger(folder, "linger", report)


def interrupt(report) -> None:
    raise KeyboardInterrupt


def ignore(message: object) -> None: ...


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < end, f"{paths} never came"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie that nobody has fetched."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + PATIENCE
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


# -- in this process -------------------------------------------------------------------------------


def test_one_worker_does_the_jobs_in_order_in_this_process(tmp_path):
    done: list[object] = []
    before = torch.get_num_threads()
    run_jobs(
        [
            (count, (tmp_path, "a", 2)),
            (lambda report: done.append(1), ()),
            (count, (tmp_path, "b", 1)),
        ],
        1,
        done.append,
    )
    assert done == [("a", 0), ("a", 1), 1, ("b", 0)]
    assert (tmp_path / "a").read_text() == f"{os.getpid()} 1" and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("job", "error"), [((interrupt, ()), KeyboardInterrupt), ((count, ()), TypeError)]
)
def test_what_ends_a_job_ends_all_and_the_threads_come_back(tmp_path, job, error):
    before = torch.get_num_threads()
    with pytest.raises(error):
        run_jobs([job, (count, (tmp_path, "never", 1))], 1, ignore)
    assert not (tmp_path / "never").exists() and torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [0, -1])
def test_less_than_one_worker_is_refused(tmp_path, workers):
    with pytest.raises(ValueError, match=f"at least 1, got {workers}"):
        run_jobs([(count, (tmp_path, "never", 1))] * 2, workers, ignore)


# -- in two processes ------------------------------------------------------------------------------


def test_every_report_of_every_job_arrives_in_its_order(tmp_path):
    received: list[tuple[str, int]] = []  # in this process, where the progress is shown
    run_jobs(
        [(count, (tmp_path, str(reports), reports)) for reports in (3, 0, 5, 7)], 2, received.append
    )
    assert sorted(received) == [
        (str(reports), number) for reports in (3, 5, 7) for number in range(reports)
    ]
    for reports in (3, 5, 7):
        assert [number for name, number in received if name == str(reports)] == list(range(reports))
    found = [(tmp_path / name).read_text().split() for name in "0357"]
    assert {threads for _, threads in found} == {"1"}
    pids = {int(pid) for pid, _ in found}
    assert os.getpid() not in pids and len(pids) <= 2 and gone(list(pids))


def test_a_failing_job_ends_the_others_with_its_exception(tmp_path):
    """The interruption almost surely comes while the other job reports, unread from then on."""
    never = [(count, (tmp_path, f"never-{i}", 1)) for i in range(6)]
    start = time.monotonic()
    with pytest.raises(ValueError, match="planted to fail"):
        run_jobs([(fail_in_the_flood, (tmp_path,)), (flood, (tmp_path,)), *never], 2, ignore)
    assert time.monotonic() - start < PATIENCE
    assert run_states(tmp_path)["state"].tolist() == ["interrupted"]
    assert gone([int((tmp_path / "flood.pid").read_text())])


def test_a_worker_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(process_pool, "GRACE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="planted to fail"):
        run_jobs([(fail, (tmp_path,)), (cling, (tmp_path,))], 2, ignore)
    assert gone([int((tmp_path / "linger.pid").read_text())])
    assert run_states(tmp_path)["state"].tolist() == ["running"]  # as of any run that was killed


def start_lingering(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Starts a parent and two workers, each in the middle of a run; six more jobs wait.

    They are a process group of their own, as of a terminal.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from test_process_pool import count, ignore, linger, run_jobs\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[2])\n"
        "    never = [(count, (folder, f'never-{i}', 1)) for i in range(6)]\n"
        "    run_jobs([(linger, (folder, 'a')), (linger, (folder, 'b')), *never], 2, ignore)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(folder / "a.pid", folder / "b.pid")
    return process, [int((folder / name).read_text()) for name in ("a.pid", "b.pid")]


def test_ctrl_c_closes_every_run_as_interrupted_and_leaves_no_process(tmp_path):
    process, workers = start_lingering(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    # The parent's own.
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    assert run_states(tmp_path)["state"].tolist() == ["interrupted"] * 2
    assert not list(tmp_path.glob("never-*")) and gone(workers)


def test_a_killed_parent_takes_its_workers_along(tmp_path):
    process, workers = start_lingering(tmp_path)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert gone(workers)
    # As of any run that was killed.
    assert run_states(tmp_path)["state"].tolist() == ["running"] * 2
