"""A run survives what happens to runs: kills, Ctrl-C, a second start, and being handed around as a
folder of files.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from biasshift.runs.integrity import DamagedRunWarning
from biasshift.runs.reader import read_run, read_runs, run_states
from biasshift.runs.schema import FLOAT32, read_config
from biasshift.runs.writer import Run

ROOT = Path(__file__).parents[2]


def rows(step: int, units: int = 3) -> pd.DataFrame:
    """What a training loop appends at a step: units, a layer, and the whole network."""
    return pd.DataFrame(
        {
            "step": step,
            "layer": ["1"] * units + ["10", ""],
            "unit": [*range(units), -1, -1],
            "mean": [step + unit / 8 for unit in range(units)] + [np.nan, np.nan],
            "coupling": [1 - 1e-9] * units + [np.nan, np.nan],
            "mean_in_abs": [np.nan] * units + [0.5, np.nan],
            "epoch": [np.nan] * (units + 1) + [step / 10],
            "train_loss": [np.nan] * (units + 1) + [1 / (1 + step)],
        }
    )


def record(folder: Path, steps: int = 3, **config) -> Path:
    with Run.create(folder, config) as run:
        for step in range(steps):
            run.append(rows(step))
    return folder


# -- the round trip --------------------------------------------------------------------------------


def test_what_is_appended_is_read_back(tmp_path):
    folder = record(tmp_path / "elu-0", activation="elu", seed=0, lr=0.01, sizes=[128, 128])
    table = read_run(folder)
    expected = pd.concat([rows(step) for step in range(3)], ignore_index=True)
    read = table[expected.columns].astype({"layer": "str"})
    pd.testing.assert_frame_equal(read, expected, check_dtype=False, rtol=1e-7)
    # float32 would make it 1, and 1/(1 - coupling) infinite.
    assert table["coupling"].max() == 1 - 1e-9
    assert (table["run"] == "elu-0").all() and (table["activation"] == "elu").all()
    assert (table["seed"] == 0).all() and (table["lr"] == 0.01).all()
    assert "sizes" not in table  # only scalars become columns
    assert read_config(folder)["sizes"] == [128, 128]


def test_the_types_on_disk_and_in_the_table(tmp_path):
    folder = record(tmp_path / "run", activation="elu")
    schema = pq.read_schema(folder / "segment-00000.parquet")
    assert schema.field("step").type == pa.int64() and schema.field("unit").type == pa.int32()
    for name in set(schema.names) - {"step", "layer", "unit"}:
        assert schema.field(name).type == (pa.float32() if name in FLOAT32 else pa.float64())
    table = read_run(folder)
    assert list(table["layer"].cat.categories) == ["1", "10", ""]  # in the order of the network
    assert list(table["run"].cat.categories) == ["run"]


def test_rows_without_layer_and_unit_are_about_the_whole_network(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        run.append(pd.DataFrame({"step": [7], "valid_error": [0.02]}))
    row = read_run(tmp_path / "run").iloc[0]
    assert (row["step"], row["layer"], row["unit"], row["valid_error"]) == (7, "", -1, 0.02)


def test_a_bounded_number_of_rows_waits_in_memory(tmp_path):
    with Run.create(tmp_path / "run", {}, max_rows=12) as run:
        for step in range(4):  # 5 rows each: the third passes 12
            run.append(rows(step))
        assert [path.name for path in sorted(tmp_path.glob("run/segment*"))] == [
            "segment-00000.parquet"
        ]
        assert len(read_run(tmp_path / "run")) == 15
    assert len(read_run(tmp_path / "run")) == 20


def test_a_run_without_rows_is_an_empty_table(tmp_path):
    with Run.create(tmp_path / "run", {"seed": 0}) as run:
        run.append(rows(0).iloc[:0])
    table = read_run(tmp_path / "run")
    assert len(table) == 0 and {"step", "layer", "unit", "run", "seed"} <= set(table.columns)


def test_a_dataclass_is_a_config(tmp_path):
    @dataclass
    class Options:
        activation: str = "relu"
        out: Path = Path("runs")

    with Run.create(tmp_path / "run", Options()):
        pass
    assert read_config(tmp_path / "run") == {"activation": "relu", "out": "runs"}


def test_provenance_says_where_a_run_came_from(tmp_path):
    record(tmp_path / "run", seed=3)
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert {"command", "torch", "python", "device", "started"} <= provenance.keys()
    assert provenance["seed"] == 3 and provenance["device"].startswith("cpu")
    assert {"commit", "dirty"} <= provenance.keys() or "version" in provenance


# -- many runs -------------------------------------------------------------------------------------


def test_many_runs_make_one_table(tmp_path):
    record(tmp_path / "relu" / "seed-0", activation="relu", seed=0, lr=0.01)
    record(tmp_path / "elu" / "seed-0", activation="elu", seed=0, alpha=1.0, batch_norm=True)
    with Run.create(tmp_path / "elu" / "deep" / "seed-1", {"activation": "elu", "seed": 1}) as run:
        run.append(pd.DataFrame({"step": [0], "layer": ["7"], "unit": [0], "var": [2.0]}))
    table = read_runs(tmp_path)
    assert table.groupby("run").size().to_dict() == {
        "deep/seed-1": 1,
        "elu/seed-0": 15,
        "relu/seed-0": 15,
    }
    deep, relu = table[table["run"] == "deep/seed-1"], table[table["run"] == "relu/seed-0"]
    assert deep["mean"].isna().all() and deep["lr"].isna().all() and (deep["var"] == 2).all()
    assert (
        (relu["activation"] == "relu").all()
        and relu["var"].isna().all()
        and relu["batch_norm"].isna().all()
    )
    assert table["seed"].dtype == np.int64 and table["lr"].dtype == np.float64
    assert set(table["layer"].cat.categories) == {"1", "10", "", "7"}


def test_a_run_named_twice_is_read_once(tmp_path):
    record(tmp_path / "a", seed=0)
    (tmp_path / "latest").symlink_to("a")
    assert len(read_runs(tmp_path, tmp_path / "a")) == 15


def test_fewer_columns_and_rows_on_request(tmp_path):
    record(tmp_path / "a", activation="elu", seed=0)
    table = read_runs(tmp_path, columns=["train_loss", "activation"], units=False)
    assert list(table.columns) == ["step", "layer", "unit", "train_loss", "run", "activation"]
    assert len(table) == 6 and (table["unit"] == -1).all()
    with pytest.raises(ValueError, match="'valid_los'"):
        read_runs(tmp_path, columns=["valid_los"])


def test_runs_may_lie_three_folders_below(tmp_path):
    record(tmp_path / "1" / "2" / "3", seed=0)
    assert len(read_runs(tmp_path)) == 15
    record(tmp_path / "a" / "b" / "c" / "d", seed=1)
    assert len(read_runs(tmp_path)) == 15  # the fourth is too far


def test_states_of_runs(tmp_path):
    record(tmp_path / "done", seed=0)
    Run.create(tmp_path / "open", {"seed": 1}).append(rows(5))
    states = run_states(tmp_path).set_index("run")
    assert states["state"].to_dict() == {"done": "finished", "open": "running"}
    assert states.loc["done", "last_step"] == 2 and pd.isna(states.loc["open", "last_step"])
    assert states["seed"].to_dict() == {"done": 0, "open": 1}
    assert (states["started"] <= states["updated"]).all()


# -- ends that nobody planned ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")]
)
def test_an_exception_keeps_the_rows_and_marks_the_run(tmp_path, error, state):
    with pytest.raises(error), Run.create(tmp_path / "run", {}) as run:
        run.append(rows(0))
        raise error
    assert len(read_run(tmp_path / "run")) == 5
    assert run_states(tmp_path)["state"].tolist() == [state]


def test_a_flush_that_fails_leaves_a_failed_readable_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"), Run.create(tmp_path / "run", {}) as run:
        run.append(rows(0))
        run.flush()
        run.append(rows(1))
        monkeypatch.setattr(pq, "write_table", full)
    assert len(read_run(tmp_path / "run")) == 5
    assert run_states(tmp_path)["state"].tolist() == ["failed"]


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_writer import rows
from biasshift.runs import Run
run = Run.create({folder!r}, {{"seed": 0}}, max_rows=50)
for step in range(10**9):
    run.append(rows(step))
    print(step, flush=True)
"""


def test_a_killed_run_is_readable_up_to_its_last_flush(tmp_path):
    code = KILLED.format(
        root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path / "run")
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = next(int(line) for line in process.stdout if int(line) >= 57)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    table = read_run(tmp_path / "run")
    steps = len(table) // 5
    assert seen - 11 <= steps and len(table) == 5 * steps
    expected = pd.concat([rows(step) for step in range(steps)], ignore_index=True)
    pd.testing.assert_series_equal(table["train_loss"], expected["train_loss"])
    states = run_states(tmp_path)
    assert states["state"].tolist() == ["running"] and states["last_step"][0] <= steps - 1


def test_temporary_files_of_a_killed_run_are_ignored(tmp_path):
    folder = record(tmp_path / "run", seed=0)
    (folder / ".segment-00001.parquet.tmp").write_bytes(b"PAR1 half a segm")
    (folder / ".state.json.tmp").write_text('{"sta')
    assert len(read_run(folder)) == 15
    with Run.create(folder, {"seed": 1}, exist="replace"):
        pass
    assert sorted(os.listdir(folder)) == ["config.json", "provenance.json", "state.json"]


def test_temporary_files_alone_do_not_hinder_a_run(tmp_path):
    (tmp_path / ".config.json.tmp").write_text("{")
    with Run.create(tmp_path, {}):
        pass
    assert run_states(tmp_path)["state"].tolist() == ["finished"]


# -- starting where something is already -----------------------------------------------------------


def test_a_run_is_not_overwritten_unless_asked(tmp_path):
    folder = record(tmp_path / "run", steps=1, seed=0)
    (folder / "notes.md").write_text("mine")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(FileExistsError, match=r"already holds a run.*--out.*replace"):
        Run.create(folder, {"seed": 1})
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    with Run.create(folder, {"seed": 1}, exist="replace"):
        pass
    table = read_run(folder)
    assert len(table) == 0 and read_config(folder) == {"seed": 1}
    assert (folder / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["thesis.tex", "config.json", "state.json", "segment-00000.parquet"]
)
@pytest.mark.parametrize("exist", ["refuse", "replace"])
def test_files_of_something_else_are_never_touched(tmp_path, name, exist):
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="not a run folder"):
        Run.create(tmp_path, {}, exist=exist)
    assert (
        os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == '{"model_type": "bert"}'
    )


def test_a_file_is_not_a_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        Run.create(tmp_path / "run", {})


@pytest.mark.parametrize(
    "config",
    [
        {"mean": 1},
        {"run": "a"},
        {"state": "x"},
        {1: 2},
        {"lr": float("nan")},
        {"seed": 2**64},
        {"net": object()},
    ],
)
def test_a_config_that_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, config):
    with pytest.raises(ValueError):
        Run.create(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("frame", "word"),
    [
        ({"layer": ["1"], "unit": [0]}, "step"),
        ({"step": [0.5]}, "step"),
        ({"step": [0], "layer": [1]}, "layer"),
        ({"step": [0], "layer": [None], "unit": [0]}, "layer"),
        ({"step": [0], "mean": ["high"]}, "mean"),
        ({"step": [0], "mean": [object()]}, "store"),
        ({"step": [0], "unit": [2**40]}, "store"),
        ({"step": [0], "seed": [1]}, "'seed'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_where_they_are_appended(tmp_path, frame, word):
    with pytest.raises(ValueError, match=word), Run.create(tmp_path / "run", {"seed": 1}) as run:
        run.append(rows(0))
        run.append(pd.DataFrame(frame))
    assert len(read_run(tmp_path / "run")) == 5


def test_a_closed_run_takes_no_rows(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        pass
    with pytest.raises(ValueError, match="closed"):
        run.append(rows(0))


# -- folders from elsewhere ------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGES = {
    "cut config": ("config.json", b'{"biasshift_run": 1, "conf'),
    "config is a list": ("config.json", b"[1, 2]"),
    "config is no text": ("config.json", b"\xff\xfe\x00"),
    "config is too deep": ("config.json", DEEP.encode()),
    "config of the future": ("config.json", b'{"biasshift_run": 99, "config": {}}'),
    "config without options": ("config.json", b'{"biasshift_run": 1, "config": [1]}'),
    "config names a column": ("config.json", b'{"biasshift_run": 1, "config": {"mean": 3}}'),
    "config with a huge number": (
        "config.json",
        b'{"biasshift_run": 1, "config": {"seed": 1' + b"0" * 400 + b"}}",
    ),
    "config with half a character": (
        "config.json",
        b'{"biasshift_run": 1, "config": {"name": "\\ud800"}}',
    ),
    "cut segment": ("segment-00000.parquet", None),
    "empty segment": ("segment-00000.parquet", b""),
    "pickled segment": ("segment-00000.parquet", pickle.dumps(Bomb())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage):
    folder = record(tmp_path / "run", seed=0)
    name, content = DAMAGES[damage]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=name) as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"state": "great"}',
        b'{"state": ["running"]}',
        b'{"state": "failed", "last_step": 1.5}',
    ],
)
def test_a_damaged_state_is_named(tmp_path, content):
    record(tmp_path / "run", seed=0)
    (tmp_path / "run" / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        run_states(tmp_path)


def keys(**more) -> dict:
    return {
        "step": pa.array([0], pa.int64()),
        "layer": ["1"],
        "unit": pa.array([0], pa.int32()),
        **more,
    }


FOREIGN = {
    "no unit": {"step": [0], "layer": ["1"]},
    "text for numbers": keys(mean=["0.5"]),
    "steps with fractions": keys(step=[0.5]),
    "steps with gaps": keys(step=pa.array([None], pa.int64())),
    "layers as numbers": keys(layer=[1]),
    "layers with gaps": keys(layer=pa.array([None], pa.string())),
    "nested": keys(mean=[{"a": 1}]),
    "bytes": keys(mean=pa.array([pickle.dumps(Bomb())])),
    "units beyond 32 bits": keys(unit=[2**40]),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_segment_of_another_making_is_named(tmp_path, what):
    folder = record(tmp_path / "run", seed=0)
    pq.write_table(pa.table(FOREIGN[what]), folder / "segment-00001.parquet")
    with pytest.raises(ValueError, match=r"segment-00001\.parquet.*Delete"):
        read_run(folder)
    (folder / "segment-00001.parquet").unlink()  # the remedy that the message names
    assert len(read_run(folder)) == 15


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    elsewhere = record(tmp_path / "elsewhere" / "run", seed=0)
    runs = tmp_path / "runs"
    folder = record(runs / "mine", seed=1)
    (folder / "segment-00001.parquet").symlink_to(elsewhere / "segment-00000.parquet")
    with pytest.raises(ValueError, match=r"segment-00001\.parquet' is a link"):
        read_runs(runs)
    (folder / "segment-00001.parquet").unlink()
    (runs / "linked").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="linked' is a link"):
        read_runs(runs)
    assert len(read_runs(runs / "linked")) == 15  # named by the user, it is no surprise


def test_a_pipe_is_not_an_ordinary_file(tmp_path):
    folder = record(tmp_path / "run", seed=0)
    os.mkfifo(folder / "segment-00001.parquet")
    with pytest.raises(ValueError, match="not an ordinary file"):
        read_run(folder)


def test_a_folder_without_runs_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for read in (read_run, read_runs, run_states):
        with pytest.raises(ValueError, match=tmp_path.name):
            read(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        read_runs(tmp_path / "nowhere")


def test_a_key_of_one_run_measured_in_another_is_refused(tmp_path):
    record(tmp_path / "a", momentum=0.9)
    with Run.create(tmp_path / "b", {}) as run:
        run.append(pd.DataFrame({"step": [0], "momentum": [0.5]}))
    with pytest.raises(ValueError, match="'momentum'"):
        read_runs(tmp_path)


# -- resuming a run --------------------------------------------------------------------------------


def interrupted(folder: Path) -> Path:
    """Three segments, of the steps 0, 1 and 2; config and state of a run that was interrupted."""
    with (
        pytest.raises(KeyboardInterrupt),
        Run.create(folder, {"seed": 0, "lr": 0.5, "out": Path("runs")}) as run,
    ):
        for step in range(3):
            run.append(rows(step))
            run.flush()
        raise KeyboardInterrupt
    return folder


CONFIG = {"seed": 0, "lr": 0.5, "out": "runs"}


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_a_run_resumes_behind_its_first_segments(tmp_path, segments):
    """What was written after them is written again, once."""
    folder = interrupted(tmp_path / "run")
    provenance = (folder / "provenance.json").read_bytes()
    with Run.resume(folder, CONFIG, segments, last_step=segments - 1 if segments else None) as run:
        states = run_states(folder)
        assert states["state"].tolist() == ["running"] and states["last_step"].tolist() == [
            segments - 1 if segments else pd.NA
        ]
        assert len(read_run(folder)) == 5 * segments and run.segments == segments
        for step in range(segments, 5):
            run.append(rows(step))
            run.flush()
    assert read_run(folder)["step"].tolist() == [step for step in range(5) for _ in range(5)]
    assert run_states(folder)["state"].tolist() == ["finished"] and run_states(folder)[
        "last_step"
    ].tolist() == [4]
    assert (folder / "provenance.json").read_bytes() == provenance


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "with seed = 0, and this one has 1"),
        ({"more": 2}, "of another version, which does not record more"),
        ({"lr": "0.5"}, "with lr = 0.5, and this"),
    ],
)
def test_a_run_of_another_configuration_cannot_be_resumed(tmp_path, change, says):
    folder = interrupted(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for call in (
        lambda config: Run.resume(folder, config, 1),
        lambda config: Run.is_finished(folder, config),
    ):
        with pytest.raises(ValueError, match=f"holds a run {says}"):
            call(CONFIG | change)
    with pytest.raises(ValueError, match=r"lr = 0\.5, and this one has None"):
        Run.resume(folder, {"seed": 0, "out": "runs"}, 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_lacks_a_segment_cannot_be_resumed(tmp_path):
    folder = interrupted(tmp_path / "run")
    (folder / "segment-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"has lost segment 1\. Give --replace"):
        Run.resume(folder, CONFIG, 3)
    with pytest.raises(ValueError, match=r"segment-00001\.parquet' is missing.*damaged='skip'"):
        read_run(folder)
    with pytest.warns(DamagedRunWarning, match="segment-00001"):
        assert len(read_runs(folder, damaged="skip")) == 10


def test_a_run_is_finished_when_it_says_so(tmp_path):
    assert not Run.is_finished(tmp_path / "nowhere", CONFIG) and not Run.is_finished(
        tmp_path, CONFIG
    )
    folder = interrupted(tmp_path / "run")
    assert not Run.is_finished(folder, CONFIG)
    with Run.resume(folder, CONFIG, 3):
        assert not Run.is_finished(folder, CONFIG)
    assert Run.is_finished(folder, CONFIG)


def test_whoever_knows_that_a_run_is_lost_can_say_so(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        run.append(rows(0))
        run.failed = True
    assert (
        run_states(tmp_path)["state"].tolist() == ["failed"]
        and len(read_run(tmp_path / "run")) == 5
    )


def test_a_replaced_run_loses_its_checkpoint_first_and_its_config_last(tmp_path, monkeypatch):
    """Killed at any moment, what is left is a run that begins anew: never a checkpoint of something
    that is not there.
    """
    folder = record(tmp_path / "run", seed=0)
    (folder / "checkpoint.pt").write_bytes(b"")
    gone: list[str] = []
    unlink = Path.unlink

    def noted(path: Path, *arguments, **options) -> None:
        gone.append(path.name)
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", noted)
    with Run.create(folder, {"seed": 1}, exist="replace"):
        pass
    assert gone == ["checkpoint.pt", "segment-00000.parquet", "config.json"]
    assert read_config(folder) == {"seed": 1} and len(read_run(folder)) == 0
