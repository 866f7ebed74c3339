import inspect
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

from biasshift import data
from biasshift.data import handwritten_digits as handwritten

SMALL = {
    "train-images-idx3-ubyte": (12, 28, 28),
    "train-labels-idx1-ubyte": (12,),
    "t10k-images-idx3-ubyte": (5, 28, 28),
    "t10k-labels-idx1-ubyte": (5,),
}


def idx(values: torch.Tensor) -> bytes:
    """The idx format by hand: two zeros, type 8 (unsigned byte), the number of axes, big-endian
    sizes, bytes.
    """
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(
        values.flatten().tolist()
    )


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
    monkeypatch.setattr(handwritten, "MNIST_FILES", SMALL)
    monkeypatch.setattr(handwritten, "MNIST_TRAIN", 9)
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
    rows = sorted((tuple(row), int(label)) for row, label in zip((16 * x).tolist(), y, strict=True))
    assert rows == sorted(
        (tuple(row), int(label)) for row, label in zip(pixels.tolist(), labels, strict=True)
    )
    assert x.mean().item() == pytest.approx(0.305, abs=1e-3) and x.std().item() == pytest.approx(
        0.376, abs=1e-3
    )  # as documented


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
    assert {
        value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)
    } == {"meta"}
    assert (moved.name, moved.classes) == ("digits", 10)


# -- MNIST -----------------------------------------------------------------------------------------


def test_mnist_reads_what_was_written(small_mnist, tmp_path):
    small, wrote = data.mnist(tmp_path), contents()
    images, labels = (
        wrote["train-images-idx3-ubyte"].reshape(12, 784),
        wrote["train-labels-idx1-ubyte"],
    )
    assert torch.equal((255 * small.x_train).round().long(), images[:9]) and torch.equal(
        small.y_train, labels[:9]
    )
    assert torch.equal((255 * small.x_valid).round().long(), images[9:]) and torch.equal(
        small.y_valid, labels[9:]
    )
    assert torch.equal(
        (255 * small.x_test).round().long(), wrote["t10k-images-idx3-ubyte"].reshape(5, 784)
    )
    assert torch.equal(small.y_test, wrote["t10k-labels-idx1-ubyte"])
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
def test_missing_files_without_a_network_are_one_sentence(small_mnist, tmp_path, download):
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError) as caught:
        data.mnist(empty, download=download)
    message = str(caught.value)
    assert str(empty) in message and "--data" in message and "$BIASSHIFT_DATA" in message
    assert "\n" not in message and message.count(". ") == 0
    assert not empty.exists()  # a failed download leaves nothing behind


def test_a_folder_that_cannot_be_made_is_one_sentence(small_mnist, tmp_path, monkeypatch):
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
def test_a_damaged_file_is_one_sentence_that_names_it(small_mnist, tmp_path, name, fault):
    (small_mnist / name).write_bytes(wrong(contents()[name])[fault])
    with pytest.raises(RuntimeError) as caught:
        data.mnist(tmp_path)
    assert str(small_mnist / name) in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_under_mnists_names_is_refused(small_mnist, tmp_path):
    labels = small_mnist / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(torch.full((12,), 10)))
    with pytest.raises(RuntimeError, match="label 10 where MNIST has 0 to 9"):
        data.mnist(tmp_path)
    labels.unlink()
    labels.mkdir()
    with pytest.raises(RuntimeError, match="cannot be read: Is a directory"):
        data.mnist(tmp_path)


@pytest.mark.data
def test_the_real_mnist(data_root):
    real = data.mnist(data_root, download=False)
    assert real.x_train.shape == (50_000, 784) and real.x_valid.shape == real.x_test.shape == (
        10_000,
        784,
    )
    x = torch.cat([real.x_train, real.x_valid])
    assert x.mean().item() == pytest.approx(0.1307, abs=1e-4) and x.std().item() == pytest.approx(
        0.3081, abs=1e-4
    )  # widely published
    assert real.y_train[:5].tolist() == [5, 0, 4, 1, 9] and real.y_test[:5].tolist() == [
        7,
        2,
        1,
        0,
        4,
    ]
    counts = torch.cat([real.y_train, real.y_valid]).bincount().tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# -- batches ---------------------------------------------------------------------------------------


@given(examples=st.integers(0, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_an_epoch_shows_every_example_once_with_its_label(examples, batch_size, seed):
    y = torch.arange(examples)
    shown = list(
        data.batches(
            torch.stack([y * 2.0, y * 3.0], 1), y, batch_size, torch.Generator().manual_seed(seed)
        )
    )
    for x, labels in shown:
        assert torch.equal(x, torch.stack([labels * 2.0, labels * 3.0], 1))
    assert sorted(label for _, labels in shown for label in labels.tolist()) == list(
        range(examples)
    )
    sizes = [len(labels) for _, labels in shown if len(labels)]
    assert sizes == [batch_size] * (examples // batch_size) + [examples % batch_size] * (
        examples % batch_size > 0
    )


def test_batches_are_shuffled_anew_from_the_generator_alone(generator):
    x, y = torch.zeros(100, 1), torch.arange(100)
    before = torch.get_rng_state()
    first, second = (
        [labels.tolist() for _, labels in data.batches(x, y, 7, generator)] for _ in range(2)
    )
    again = [
        labels.tolist() for _, labels in data.batches(x, y, 7, torch.Generator().manual_seed(0))
    ]
    assert first == again and first != second and first != [chunk.tolist() for chunk in y.split(7)]
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_refuses_what_cannot_be_batched(generator):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        data.batches(torch.zeros(3, 2), torch.arange(3), 0, generator)
    with pytest.raises(ValueError, match="3 examples and y has 4"):
        inspect.unwrap(data.batches)(torch.zeros(3, 2), torch.arange(4), 2, generator)


def test_shapes_are_checked_under_pytest(generator):
    """The import hook of conftest.py is at work: as users call it, the same line raises the
    ValueError above.
    """
    with pytest.raises(TypeCheckError):
        data.batches(torch.zeros(3, 2), torch.arange(4), 2, generator)


# -- views -----------------------------------------------------------------------------------------


def test_shifted_images_are_moved_by_up_to_one_pixel():
    """Against numpy's roll on an image with a frame of zeros, which nothing is rolled across."""
    side, generator = 5, torch.Generator().manual_seed(0)
    images = torch.zeros(3, side, side)
    images[:, 1:-1, 1:-1] = torch.rand(3, side - 2, side - 2, generator=generator)
    flat, y = images.flatten(1), torch.tensor([7, 8, 9])
    moved = data.shifted(data.DataSet("three", 10, flat, y, flat, y, flat, y), side)
    places = {
        tuple(np.roll(images[0].numpy(), (i, j), (0, 1)).ravel())
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    }
    assert {tuple(view) for view in moved.x_train[::3].numpy()} == places and len(places) == 9
    assert torch.equal(moved.x_train[:3], flat)  # the first view is the image itself
    assert torch.equal(moved.y_train, y.repeat(9)) and moved.views == 9
    assert torch.equal(moved.x_valid, flat) and torch.equal(moved.x_test, flat)


def test_pixels_that_come_in_are_0_and_those_that_leave_are_gone():
    ones = torch.ones(1, 9)
    y = torch.tensor([0])
    moved = data.shifted(data.DataSet("ones", 1, ones, y, ones, y, ones, y), 3)
    assert sorted(moved.x_train.sum(1).tolist()) == [4, 4, 4, 4, 6, 6, 6, 6, 9]


def test_the_shifted_digits_are_nine_times_as_many():
    small, moved = data.digits(), data.shifted(data.digits(), side=8)
    assert len(moved.x_train) == 9 * 1437 and torch.equal(moved.x_train[:1437], small.x_train)
    assert torch.equal(moved.x_valid, small.x_valid) and torch.equal(moved.y_test, small.y_test)
    assert moved.to("cpu").views == 9


@given(
    images=st.integers(0, 20),
    views=st.integers(1, 5),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_an_epoch_shows_every_image_once_at_one_of_its_views(images, views, batch_size, seed):
    number = torch.arange(images).repeat(views)
    place = torch.arange(views).repeat_interleave(images)
    x = torch.stack([number, place], 1).float()
    shown = list(data.batches(x, number, batch_size, torch.Generator().manual_seed(seed), views))
    rows = torch.cat([batch for batch, _ in shown]) if shown else x[:0]
    assert sorted(rows[:, 0].tolist()) == list(range(images)) and all(
        0 <= at < views for at in rows[:, 1]
    )
    assert torch.equal(
        torch.cat([labels for _, labels in shown]).float() if shown else rows[:, 0], rows[:, 0]
    )


def test_views_are_chosen_evenly_and_anew(generator):
    place = torch.arange(9).repeat_interleave(1000)
    first, second = (
        torch.cat([y for _, y in data.batches(place[:, None].float(), place, 64, generator, 9)])
        for _ in range(2)
    )
    assert not torch.equal(first, second)
    counts = first.bincount(minlength=9)  # binomial: 111 ± 10 each
    assert counts.sum() == 1000 and (counts - 1000 / 9).abs().max() < 50


def test_one_view_draws_nothing_but_the_order():
    x, y = torch.zeros(10, 1), torch.arange(10)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    list(data.batches(x, y, 4, generators[0], 1))
    torch.randperm(10, generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("views", [0, -1, 3])
def test_views_that_do_not_divide_the_examples_are_refused(generator, views):
    with pytest.raises(ValueError, match=f"10 examples are no {views} views"):
        data.batches(torch.zeros(10, 1), torch.arange(10), 4, generator, views)
