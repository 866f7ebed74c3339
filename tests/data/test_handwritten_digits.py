"""Digits and MNIST: their files, their splits, and shifted copies of their images."""

import gzip
import struct
from itertools import product
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from biasshift import data
from biasshift.data import handwritten_digits

SMALL = {
    "train-images-idx3-ubyte": (12, 28, 28),
    "train-labels-idx1-ubyte": (12,),
    "t10k-images-idx3-ubyte": (5, 28, 28),
    "t10k-labels-idx1-ubyte": (5,),
}


def idx(values: torch.Tensor) -> bytes:
    """The idx format by hand: two zeros, type 8 (unsigned byte), axes, big-endian sizes, bytes."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + bytes(values.flatten().tolist())


def contents() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(256 if len(shape) == 3 else 10, shape, generator=generator)
        for name, shape in SMALL.items()
    }


def write(root: Path, names=tuple(SMALL)) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        (raw / name).write_bytes(idx(contents()[name]))
    return raw


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    """MNIST with 12 + 5 images below `tmp_path`, and no network."""
    monkeypatch.setattr(handwritten_digits, "MNIST_FILES", SMALL)
    monkeypatch.setattr(handwritten_digits, "MNIST_TRAIN", 9)
    monkeypatch.delenv("BIASSHIFT_DATA", raising=False)
    no_network(monkeypatch)
    return write(tmp_path)


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", refuse)


# -- digits ----------------------------------------------------------------------------------------


def test_digits_are_partitioned():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = data.digits()
    x = torch.cat([small.x_train, small.x_valid, small.x_test])
    y = torch.cat([small.y_train, small.y_valid, small.y_test])
    assert [len(small.x_train), len(small.x_valid), len(small.x_test)] == [1437, 180, 180]
    assert x.dtype == torch.float32 and y.dtype == torch.int64

    def examples(images, labels):
        return sorted(
            (*row, int(label)) for row, label in zip(images.tolist(), labels, strict=True)
        )

    assert examples(16 * x, y) == examples(pixels, labels)
    assert x.mean().item() == pytest.approx(0.305, abs=1e-3)  # as documented
    assert x.std().item() == pytest.approx(0.376, abs=1e-3)


def test_the_split_of_digits_follows_its_seed_and_no_other():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = data.digits()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(first.x_train, data.digits().x_train)
    assert not torch.equal(first.x_train, data.digits(seed=1).x_train)


def test_every_class_is_in_every_split():
    small = data.digits()
    for y in (small.y_train, small.y_valid, small.y_test):
        assert set(y.tolist()) == set(range(small.classes))


def test_to_moves_every_tensor():
    moved = data.digits().to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.name, moved.classes) == ("digits", 10)


# -- MNIST -----------------------------------------------------------------------------------------


def test_mnist_reads_what_was_written(small_mnist, tmp_path):
    small = data.mnist(tmp_path)
    images, labels, test_images, test_labels = contents().values()
    for x, written in (
        (small.x_train, images[:9]),
        (small.x_valid, images[9:]),
        (small.x_test, test_images),
    ):
        assert torch.equal((255 * x).round().long(), written.flatten(1))
    for y, written in (
        (small.y_train, labels[:9]),
        (small.y_valid, labels[9:]),
        (small.y_test, test_labels),
    ):
        assert torch.equal(y, written)
    assert small.x_train.dtype == torch.float32 and small.x_train.max() <= 1


def test_mnist_can_stay_in_bytes(small_mnist, tmp_path):
    stored, scaled = data.mnist(tmp_path, as_bytes=True), data.mnist(tmp_path)
    for name in ("x_train", "x_valid", "x_test"):
        assert getattr(stored, name).dtype == torch.uint8
        assert torch.equal(data.Scale()(getattr(stored, name)), getattr(scaled, name))


def test_the_folder_is_the_argument_then_the_variable_then_data(small_mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/MNIST/raw"):
        data.mnist(download=False)
    monkeypatch.setenv("BIASSHIFT_DATA", str(tmp_path))
    assert len(data.mnist(download=False).x_train) == 9
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.mnist("elsewhere", download=False)


@pytest.mark.parametrize("download", [False, True])
def test_missing_files_without_a_network_are_one_message(small_mnist, tmp_path, download):
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError) as caught:
        data.mnist(empty, download=download)
    message = str(caught.value)
    assert str(empty) in message and "--data" in message and "$BIASSHIFT_DATA" in message
    assert "\n" not in message and message.endswith(".") and message.count(". ") == 1
    assert not empty.exists()  # a failed download leaves nothing behind


def test_a_folder_that_cannot_be_made_is_one_message(small_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda folder, download: write(Path(folder)))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileNotFoundError, match="Not a directory"):
        data.mnist(tmp_path / "file")


def test_a_download_fills_in_what_is_missing_and_nothing_else(small_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda folder, download: write(Path(folder)))
    (small_mnist / "t10k-labels-idx1-ubyte").unlink()
    kept = small_mnist / "train-labels-idx1-ubyte"
    kept.write_bytes(idx(torch.full((12,), 3)))
    assert torch.equal(data.mnist(tmp_path).y_test, contents()["t10k-labels-idx1-ubyte"])
    assert set(data.mnist(tmp_path).y_train.tolist()) == {3}
    assert sorted(path.name for path in small_mnist.iterdir()) == sorted(SMALL)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_download_leaves_no_file(small_mnist, tmp_path, monkeypatch, stop):
    def half(folder, download):
        write(Path(folder), list(SMALL)[:2])
        raise stop

    monkeypatch.setattr(torchvision.datasets, "MNIST", half)
    with pytest.raises((FileNotFoundError, KeyboardInterrupt)):
        data.mnist(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def wrong(values: torch.Tensor) -> dict[str, bytes]:
    """Ways in which a file can be broken."""
    good = idx(values)
    return {
        "empty": b"",
        "half a header": good[:6],
        "truncated": good[:-1],
        "one byte more": good + b"\0",
        "html": b"<!DOCTYPE html><title>404</title>",
        "gzip": b"\x1f\x8b\x08\x00" + good,
        "unknown type": good[:2] + b"\x0a" + good[3:],
        "floats": good[:2] + b"\x0d" + good[3:],
        "too few": idx(values[:-1]),
    }


@pytest.mark.parametrize("fault", wrong(torch.zeros(1, 1, 1, dtype=torch.int64)))
@pytest.mark.parametrize("name", SMALL)
def test_a_damaged_file_is_one_message_that_names_it(small_mnist, tmp_path, name, fault):
    (small_mnist / name).write_bytes(wrong(contents()[name])[fault])
    with pytest.raises(RuntimeError) as caught:
        data.mnist(tmp_path)
    assert str(small_mnist / name) in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_under_mnists_names_is_refused(small_mnist, tmp_path):
    labels = small_mnist / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(torch.full((12,), 10)))
    with pytest.raises(RuntimeError, match="must hold labels from 0 to 9, got 10"):
        data.mnist(tmp_path)
    labels.unlink()
    labels.mkdir()
    with pytest.raises(RuntimeError, match=r"cannot be read \(Is a directory\)"):
        data.mnist(tmp_path)


# -- MNIST as it is published ----------------------------------------------------------------------


def pack(raw: Path, names=tuple(SMALL)) -> None:
    for name in names:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("download", [False, True])
def test_packed_files_are_read_without_a_network(small_mnist, tmp_path, count, download):
    unpacked = data.mnist(tmp_path, download=False)
    pack(small_mnist, list(SMALL)[-count:])
    present = sorted(small_mnist.iterdir())
    packed = data.mnist(tmp_path, download=download)
    for name in ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"):
        assert torch.equal(getattr(packed, name), getattr(unpacked, name))
    assert sorted(small_mnist.iterdir()) == present  # nothing is unpacked into the folder


def test_an_unpacked_file_is_preferred_to_the_packed_one(small_mnist, tmp_path):
    expected = data.mnist(tmp_path).y_train
    (small_mnist / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert torch.equal(data.mnist(tmp_path).y_train, expected)


def test_a_missing_file_is_named_where_the_others_are_packed(small_mnist, tmp_path):
    pack(small_mnist)
    (small_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-labels-idx1-ubyte of MNIST"):
        data.mnist(tmp_path, download=False)


def wrongly_packed(values: torch.Tensor) -> dict[str, bytes]:
    """Ways in which a packed file can be broken: what is in it, and the packing."""
    good = gzip.compress(idx(values))
    contents_wrong = {f"{fault} in it": gzip.compress(b) for fault, b in wrong(values).items()}
    return contents_wrong | {
        "empty": b"",
        "truncated": good[:-9],
        "without its checksum": good[:-8],
        "wrong checksum": good[:-8] + bytes(8),
        "not packed": idx(values),
        "html": b"<!DOCTYPE html><title>404</title>",
        "bytes turned": good[:20] + bytes(255 - byte for byte in good[20:30]) + good[30:],
    }


@pytest.mark.parametrize("fault", wrongly_packed(torch.zeros(1, 1, 1, dtype=torch.int64)))
@pytest.mark.parametrize("name", SMALL)
def test_a_damaged_packed_file_is_one_message_that_names_it(small_mnist, tmp_path, name, fault):
    pack(small_mnist)
    (small_mnist / f"{name}.gz").write_bytes(wrongly_packed(contents()[name])[fault])
    with pytest.raises(RuntimeError) as caught:
        data.mnist(tmp_path)
    assert str(small_mnist / f"{name}.gz") in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_in_packed_files_is_refused(small_mnist, tmp_path):
    pack(small_mnist)
    labels = small_mnist / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(torch.full((12,), 10))))
    with pytest.raises(RuntimeError, match="must hold labels from 0 to 9, got 10"):
        data.mnist(tmp_path)
    labels.unlink()
    labels.mkdir()
    with pytest.raises(RuntimeError, match=r"cannot be read \(Is a directory\)"):
        data.mnist(tmp_path)


@pytest.mark.data
def test_the_real_mnist(data_root):
    real = data.mnist(data_root, download=False)
    assert real.x_train.shape == (50_000, 784)
    assert real.x_valid.shape == real.x_test.shape == (10_000, 784)
    x = torch.cat([real.x_train, real.x_valid])
    assert x.mean().item() == pytest.approx(0.1307, abs=1e-4)  # widely published
    assert x.std().item() == pytest.approx(0.3081, abs=1e-4)
    assert real.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert real.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    counts = torch.cat([real.y_train, real.y_valid]).bincount().tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# -- views -----------------------------------------------------------------------------------------


def test_shifted_images_are_moved_by_up_to_one_pixel():
    """Against numpy's roll on an image with a frame of zeros, which nothing is rolled across."""
    side, generator = 5, torch.Generator().manual_seed(0)
    images = torch.zeros(3, side, side)
    images[:, 1:-1, 1:-1] = torch.rand(3, side - 2, side - 2, generator=generator)
    flat, y = images.flatten(1), torch.tensor([7, 8, 9])
    moved = data.shifted(data.DataSet("three", 10, flat, y, flat, y, flat, y), side)
    shifts = product((-1, 0, 1), repeat=2)
    places = {tuple(np.roll(images[0].numpy(), shift, (0, 1)).ravel()) for shift in shifts}
    assert {tuple(view) for view in moved.x_train[::3].numpy()} == places and len(places) == 9
    assert torch.equal(moved.x_train[:3], flat)  # the first view is the image itself
    assert torch.equal(moved.y_train, y.repeat(9)) and moved.views == 9
    assert torch.equal(moved.x_valid, flat) and torch.equal(moved.x_test, flat)


def test_pixels_that_come_in_are_0_and_those_that_leave_are_lost():
    ones = torch.ones(1, 9)
    y = torch.tensor([0])
    moved = data.shifted(data.DataSet("ones", 1, ones, y, ones, y, ones, y), 3)
    assert sorted(moved.x_train.sum(1).tolist()) == [4, 4, 4, 4, 6, 6, 6, 6, 9]


def test_the_shifted_digits_are_nine_times_as_many():
    small, moved = data.digits(), data.shifted(data.digits(), side=8)
    assert len(moved.x_train) == 9 * 1437 and torch.equal(moved.x_train[:1437], small.x_train)
    assert torch.equal(moved.x_valid, small.x_valid) and torch.equal(moved.y_test, small.y_test)
    assert moved.to("cpu").views == 9
