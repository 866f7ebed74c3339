"""Files from anywhere: what they promise is compared with what they hold, before it is read."""

import gzip
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.datasets.folder import make_dataset

from biasshift import cli, data
from biasshift.cli import results  # noqa: F401  takes long
from biasshift.data import image_folders, ordinary_files
from biasshift.data.handwritten_digits import MNIST_FILES, _read_idx
from biasshift.data.safe_pickle import read_pickle
from biasshift.runs import limits
from biasshift.runs.reader import find_runs, read_runs
from biasshift.runs.writer import Run

ROOT = Path(__file__).parents[2]
SOON = 2.0  # seconds; under load a second is not what it was


@contextmanager
def soon() -> Iterator[None]:
    """What is refused is refused at once."""
    began = time.process_time()
    yield
    assert time.process_time() - began < SOON


def record(folder: Path, *frames: pd.DataFrame, **config) -> Path:
    with Run.create(folder, {"activation": "elu", "seed": 0, **config}) as run:
        for frame in frames:
            run.append(frame)
    return folder


def curve(steps: int = 3) -> pd.DataFrame:
    return pd.DataFrame({"step": range(steps), "train_loss": np.linspace(2, 1, steps)})


def units(step: int, count: int, values) -> pd.DataFrame:
    return pd.DataFrame({"step": step, "layer": "2", "unit": range(count), "mean": values})


def segment(path: Path, rows: int, **options) -> Path:
    """Rows that are all equal."""
    kinds = {"step": "int64", "unit": "int32", "mean": "float32"}
    columns = {name: np.zeros(rows, kind) for name, kind in kinds.items()}
    names = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["2"])
    table = pa.table({**columns, "layer": names})
    pq.write_table(table, path, compression="zstd", **options)
    return path


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [1, 3])
@pytest.mark.parametrize("units", [True, False])
def test_a_segment_of_equal_rows_is_refused_unread(tmp_path, monkeypatch, units, extra):
    folder = record(tmp_path / "runs" / "elu-0", curve())
    monkeypatch.setattr(limits, "FEW_ROWS", 2**19)
    path = segment(folder / "segment-00001.parquet", limits.FEW_ROWS * extra + 1)
    with pq.ParquetFile(path) as file, pytest.raises(ValueError, match="cannot hold"):
        monkeypatch.setattr(pq.ParquetFile, "read", None)
        monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
        limits.read_bounded(file, path.stat().st_size, None, units)


@pytest.mark.parametrize("values", [0.0, np.nan, "random"])
def test_the_rows_of_one_measurement_are_never_too_many(tmp_path, monkeypatch, values):
    """Units have different numbers, whatever was measured of them."""
    monkeypatch.setattr(limits, "FEW_ROWS", 0)
    numbers = np.random.default_rng(0).normal(size=100_000) if values == "random" else values
    folder = record(tmp_path / "elu-0", units(7, 100_000, numbers))
    assert len(read_runs(folder)) == 100_000


def test_what_would_not_fit_the_memory_is_not_begun(tmp_path, monkeypatch):
    for seed in range(3):
        record(tmp_path / f"elu-{seed}", units(0, 1000, 1.0), curve(), seed=seed)
    monkeypatch.setattr(limits, "memory_bytes", lambda: 200_000)
    with pytest.raises(ValueError, match=r"rows up to those of '.*elu-2' need .* GiB of memory"):
        read_runs(tmp_path)
    assert len(read_runs(tmp_path, units=False)) == 9
    assert len(read_runs(tmp_path, columns=["train_loss"])) == 3009


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < limits.memory_bytes() < 2**50


def test_text_that_unpacks_to_the_whole_memory_counts(tmp_path, monkeypatch):
    folder = record(tmp_path / "elu-0", curve())
    table = pa.table({"step": [0], "layer": ["x" * 2**22], "unit": pa.array([0], pa.int32())})
    pq.write_table(table, folder / "segment-00000.parquet", compression="zstd")
    assert (folder / "segment-00000.parquet").stat().st_size < 10_000
    monkeypatch.setattr(limits, "memory_bytes", lambda: 2**22)
    with pytest.raises(ValueError, match="of memory"):
        read_runs(folder)


def test_a_column_of_another_kind_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "segment.parquet"
    rows = {"step": [0], "layer": [""], "unit": [-1], "mean": [[1.0] * 1000]}
    pq.write_table(pa.table(rows), path)
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pq.ParquetFile(path) as file, pytest.raises(ValueError, match="'mean' must hold numbers"):
        limits.read_bounded(file, path.stat().st_size, None, True)


DAMAGED_FOOTERS = """
import random, sys
from pathlib import Path
from biasshift.runs.reader import read_runs

path, chance = Path(sys.argv[1]), random.Random(0)
whole = path.read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
refused = 0
for _ in range(int(sys.argv[2])):
    data = bytearray(whole)
    start, size = chance.randrange(footer, len(data) - 8), chance.choice([1, 4, 32])
    part = [chance.choice([byte, 0, chance.randrange(256)]) for byte in data[start : start + size]]
    data[start : start + len(part)] = bytes(part)
    path.write_bytes(data)
    try:
        read_runs(path.parent)
    except ValueError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("name", ["segment-00000.parquet", "segment-00001.parquet"])
def test_a_damaged_footer_does_not_end_the_process(tmp_path, name):
    """pyarrow calls `abort` where it builds the metadata of some damaged columns."""
    folder = record(tmp_path / "elu-0", units(3, 50, 1.0))
    if name != "segment-00000.parquet":  # one that the run does not list has no checksum
        (folder / name).write_bytes((folder / "segment-00000.parquet").read_bytes())
    command = [sys.executable, "-c", DAMAGED_FOOTERS, str(folder / name), "300"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 30


def test_few_rows_are_the_same_as_all_rows_filtered(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BATCH_ROWS", 7)
    folder = record(tmp_path / "elu-0", curve(20), units(3, 50, 1.0), curve(5).assign(step=9))
    every = read_runs(folder)
    few = read_runs(folder, units=False)
    expected = every[every["unit"] == -1].reset_index(drop=True)
    assert few["train_loss"].tolist() == expected["train_loss"].tolist()
    assert few["step"].tolist() == expected["step"].tolist() and set(few["unit"]) == {-1}


def test_the_list_of_runs_reads_the_rows_that_it_shows(tmp_path, capsys, monkeypatch):
    record(tmp_path / "runs" / "elu-0", curve(), units(0, 1000, 1.0))
    asked = []
    iterate = pq.ParquetFile.iter_batches

    def noted(file, *arguments, columns, **options):
        asked.extend(columns)
        return iterate(file, *arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    cli.main(["runs", str(tmp_path / "runs")])
    assert "finished" in (shown := capsys.readouterr().out) and "loss" in shown
    assert set(asked) == {"step", "layer", "unit", "train_loss"}


# -- folders of runs -------------------------------------------------------------------------------


def test_links_that_lead_around_are_entered_once(tmp_path):
    record(tmp_path / "a" / "b" / "elu-0", curve())
    for number in range(30):
        (tmp_path / f"around-{number}").symlink_to(".")
        (tmp_path / "a" / f"up-{number}").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    with soon():
        assert [folder.name for folder in find_runs([tmp_path])] == ["elu-0"]


def test_a_link_that_comes_first_hides_no_run_below(tmp_path):
    """Reached by the link, the folder is too deep for its run; by itself it is not."""
    (tmp_path / "a" / "a").mkdir(parents=True)
    (tmp_path / "a" / "a" / "link").symlink_to("../../b")
    record(tmp_path / "b" / "c" / "elu-0", curve())
    assert [folder.name for folder in find_runs([tmp_path])] == ["elu-0"]


@pytest.mark.parametrize("name", ["config.json", "state.json", "segment-00001.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "zero", "loop"])
def test_what_is_not_a_file_is_one_sentence(tmp_path, capsys, name, kind):
    folder = record(tmp_path / "runs" / "elu-0", curve())
    path = folder / name
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "zero":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
    with soon(), pytest.raises(SystemExit) as end:
        cli.main(["runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("biasshift: ")
    assert name.split("-")[0] in said


CONFIGS = {
    "nested lists": "[" * 200_000,
    "nested objects": '{"a":' * 200_000,
    "nested and closed": '{"biasshift_run":1,"config":{"a":' + "[" * 99_999 + "]" * 99_999 + "}}",
    "many digits": '{"biasshift_run":1,"config":{"seed":' + "9" * 5000 + "}}",
    "infinite": '{"biasshift_run":1,"config":{"seed":1e400}}',
    "65 bits": '{"biasshift_run":1,"config":{"seed":' + "9" * 30 + "}}",
    "NaN": '{"biasshift_run":1,"config":{"lr":NaN}}',
    "huge": '{"biasshift_run":1,"config":{"a":"' + "x" * 11_000_000 + '"}}',
    "empty": "",
    "null": "null",
    "no config": '{"biasshift_run":1}',
    "config of text": '{"biasshift_run":1,"config":"x"}',
    "other layout": '{"biasshift_run":"1","config":{}}',
    "half a sign": '{"biasshift_run":1,"config":{"a":"\\ud800"}}',
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_cannot_be_is_one_sentence(tmp_path, capsys, what):
    folder = tmp_path / "runs" / "elu-0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(CONFIGS[what], encoding="utf-8")
    with soon(), pytest.raises(SystemExit) as end:
        cli.main(["runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "config.json'" in said


@pytest.mark.parametrize("seed", ["null", '"x"', "true", "[1]", '{"a": 1}', "-1", "1.5", '""'])
def test_a_seed_of_any_kind_does_not_hide_the_run(tmp_path, capsys, seed):
    folder = record(tmp_path / "runs" / "elu-0", curve())
    (folder / "state.json").unlink()
    config = f'{{"biasshift_run": 1, "config": {{"activation": "elu", "seed": {seed}}}}}'
    (folder / "config.json").write_text(config)
    with pytest.warns(UserWarning):  # it has no checksum
        cli.main(["runs", str(tmp_path / "runs")])
    assert "elu-0" in capsys.readouterr().out


# -- data sets -------------------------------------------------------------------------------------

LABELS = "train-labels-idx1-ubyte"
SHAPE = MNIST_FILES[LABELS]


def idx(count: int = SHAPE[0]) -> bytes:
    return struct.pack(">II", 0x801, count) + bytes(count)


def test_labels_are_read_plain_and_packed(tmp_path):
    for name, content in ((LABELS, idx()), (f"{LABELS}.gz", gzip.compress(idx()))):
        (tmp_path / name).write_bytes(content)
        assert torch.equal(_read_idx(tmp_path / name, SHAPE), torch.zeros(SHAPE, dtype=torch.long))
    halves = gzip.compress(idx()[:1000]) + gzip.compress(idx()[1000:]) + bytes(7)
    (tmp_path / f"{LABELS}.gz").write_bytes(halves)
    assert len(_read_idx(tmp_path / f"{LABELS}.gz", SHAPE)) == SHAPE[0]


def bombs() -> dict[str, bytes]:
    packed = gzip.compress(idx())
    return {
        "bomb.gz": gzip.compress(idx() + bytes(50_000_000)),
        "members.gz": gzip.compress(b"") * 2500,
        "cut.gz": packed[:-9],
        "checksum.gz": packed[:-8] + b"\1\2\3\4" + packed[-4:],
        "behind.gz": packed + b"more",
        "long": idx() + b"\0",
        "short": idx()[:-1],
        "header": idx()[:5],
        "empty": b"",
        "empty.gz": b"",
        "float": b"\0\0\x0d\1" + idx()[4:],
        "count": struct.pack(">II", 0x801, 2**32 - 1) + bytes(SHAPE[0]),
    }


@pytest.mark.parametrize("what", bombs())
def test_labels_that_are_not_theirs_are_one_sentence(tmp_path, what):
    path = tmp_path / what
    path.write_bytes(bombs()[what])
    with soon(), pytest.raises(RuntimeError, match=rf"'.*{what}' .*\. It is damaged"):
        _read_idx(path, SHAPE)


def test_a_file_without_end_takes_no_memory(tmp_path):
    path = tmp_path / LABELS
    with path.open("wb") as file:
        file.truncate(2**40)
    with soon(), pytest.raises(RuntimeError, match="cannot be read"):
        _read_idx(path, SHAPE)
    with soon(), pytest.raises(RuntimeError, match="must have at most"):
        read_pickle(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_no_data_set_waits_for_a_pipe(tmp_path, kind):
    raw, cifar = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    tree = tmp_path / "tree"
    for folder in (raw, cifar, tree / "train" / "a", tree / "val" / "a"):
        folder.mkdir(parents=True)
    names = [raw / name for name in MNIST_FILES]
    names += [cifar / name for name in (*data.cifar.BATCHES, "test_batch")]
    names += [tree / "train" / "a" / "1.png", tree / "val" / "a" / "1.png"]
    for path in names:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            _bind(path)
    for read in (lambda: data.mnist(tmp_path, False), lambda: data.cifar10(tmp_path, False)):
        with soon(), pytest.raises(RuntimeError, match=r"cannot be read|is not a file"):
            read()
    photograph = data.imagenet(tree).train.paths[0]
    with soon(), pytest.raises(RuntimeError, match="is not a file"):
        image_folders.read_photograph(photograph, 8)


def _bind(path: Path) -> None:
    here = Path.cwd()
    try:  # names of sockets are short
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def test_what_becomes_a_pipe_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    checks, refuse = [lambda *_: None], ordinary_files._refuse_other
    checks.append(refuse)
    monkeypatch.setattr(ordinary_files, "_refuse_other", lambda *given: checks.pop(0)(*given))
    with soon(), pytest.raises(OSError, match="pipe or a device"):
        ordinary_files.open_ordinary(tmp_path / "pipe")
    assert not checks


def test_a_pickle_of_many_parts_is_refused(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02" + b"]0" * 4_000_000 + b"}.")
    with pytest.raises(RuntimeError, match="is refused"):
        read_pickle(path)
    real = {
        "data": 1,
        "fine_labels": [7] * 50_000,
        "filenames": [f"{n}.png" for n in range(50_000)],
    }
    path.write_bytes(pickle.dumps(real, protocol=2))
    assert read_pickle(path)["fine_labels"] == real["fine_labels"]


# -- folders of images -----------------------------------------------------------------------------


def png(width: int, height: int, content: bytes, color: int = 0, bits: int = 8) -> bytes:
    def chunk(kind: bytes, inner: bytes) -> bytes:
        checksum = zlib.crc32(kind + inner)
        return struct.pack(">I", len(inner)) + kind + inner + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + packed + chunk(b"IEND", b"")


def tree(root: Path, classes=("a", "b")) -> Path:
    for split in ("train", "val"):
        for name in classes:
            (root / split / name / "below").mkdir(parents=True)
            for file in ("2.png", "1.PNG", "below/0.jpg", "below.png", "notes.txt"):
                (root / split / name / file).write_bytes(png(2, 2, bytes(6)))
    return root


def test_links_that_lead_around_end(tmp_path):
    root = tree(tmp_path)
    expected = data.imagenet(root).train.paths
    for number in range(4):
        (root / "train" / "a" / f"around-{number}").symlink_to(".")
        (root / "train" / "a" / "below" / f"up-{number}").symlink_to("..")
    with soon():
        assert data.imagenet(root).train.paths == expected


def test_images_come_in_the_order_of_torchvision(tmp_path):
    root = tree(tmp_path / "here", ("a", "b", "B", "ä", "a b"))
    elsewhere = tmp_path / "elsewhere" / "more"
    elsewhere.mkdir(parents=True)
    (elsewhere / "9.jpeg").write_bytes(b"")
    (root / "train" / "a" / "link").symlink_to(elsewhere.parent)
    found = data.imagenet(root)
    number = {name: place for place, name in enumerate(found.folders)}
    expected = make_dataset(str(root / "train"), number, extensions=image_folders.EXTENSIONS)
    assert list(zip(found.train.paths, found.train.y.tolist(), strict=True)) == expected


def test_a_mapping_that_is_not_a_short_file_is_one_sentence(tmp_path):
    root = tree(tmp_path)
    path = root / image_folders.MAPPING
    os.mkfifo(path)
    with soon(), pytest.raises(RuntimeError, match="cannot be read as text"):
        data.imagenet(root)
    path.unlink()
    path.write_text("a first\nb second\n" + "\n" * 2**20)  # once it was read up to a mebibyte
    with pytest.raises(RuntimeError, match="cannot be read as text"):
        data.imagenet(root)


SWOLLEN = {
    "narrow": png(1, 50_000_000, bytes(100)),
    "narrow and whole": png(1, 500_000, bytes(1_000_000)),
    "wide": png(100_000_000, 2, bytes(100)),
    "no rows": png(9000, 9000, b""),
    "few rows": png(9000, 9000, bytes(9001 * 5)),
    "few rows of 16 bits": png(9000, 9000, bytes(18001 * 5), bits=16),
    "few colored rows": png(9000, 9000, bytes(27001 * 5), color=2),
}


@pytest.mark.parametrize("what", SWOLLEN)
def test_an_image_that_promises_too_much_is_refused_by_its_header(tmp_path, monkeypatch, what):
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)  # that decodes
    path = tmp_path / "image.png"
    path.write_bytes(SWOLLEN[what])
    with soon(), pytest.raises(RuntimeError, match=r"than is safe|cannot be read as an image"):
        image_folders.read_photograph(str(path), 256)


def test_gray_of_16_bits_is_scaled_as_before(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 30)).astype(np.uint16)
    found = image_folders._in_8_bits(pixels)
    assert (found == np.rint(pixels / 257).astype(np.uint8)).all()


def test_a_png_with_a_chunk_of_gigabytes_is_not_read(tmp_path):
    """A file with holes: its chunk of pixels has 2 GiB of zeros behind the first bytes."""
    whole = png(3, 3, bytes(12))
    start = whole.index(b"IDAT") - 4
    path = tmp_path / "image.png"
    with path.open("wb") as file:
        file.write(whole[:start] + struct.pack(">I", 2**31 - 1) + b"IDAT" + b"\x78\x9c")
        file.truncate(2**31 + 1000)
    read = []
    with (
        soon(),
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(RuntimeError, match="cannot be read as an image"),
    ):
        patched.setattr(image_folders, "open_ordinary", lambda path: Counting(path, read))
        image_folders.read_photograph(str(path), 8)
    assert 0 < sum(read) < 2**20


class Counting(io.FileIO):
    """A file that keeps count of what is read of it."""

    def __init__(self, path: str, read: list[int]):
        super().__init__(path)
        self.counts = read

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        self.counts.append(len(content))
        return content
