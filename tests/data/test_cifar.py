"""CIFAR's files: what they hold, and that nothing in them is executed.

The files are written by hand, as Python 2 did, and by pickle itself.
"""

import io
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from biasshift import data
from biasshift.data import cifar
from biasshift.data.safe_pickle import Refused, _inspect, _Unpickler, read_pickle

TRAIN, TEST = 100, 20  # images of the little sets
FILES = {
    "cifar10": ["cifar-10-batches-py", *cifar.BATCHES, "test_batch"],
    "cifar100": ["cifar-100-python", "train", "test"],
}


def python2(entries: dict[bytes, object]) -> bytes:
    """Protocol 2 as Python 2's pickle wrote it: strings of bytes, and so an array's content."""

    def text(value: bytes) -> bytes:
        return b"U" + struct.pack("<B", len(value)) + value

    def write(value: object) -> bytes:
        if isinstance(value, np.ndarray):
            array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
            shape = b"".join(b"M" + struct.pack("<H", size) for size in value.shape)
            dtype = b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNN" + b"J\xff\xff\xff\xff" * 2
            content = struct.pack("<i", value.nbytes) + value.tobytes()
            return array + b"(K\1" + shape + b"\x86" + dtype + b"K\0tb\x89T" + content + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(b"K" + struct.pack("<B", label) for label in value) + b"e"
        return text(value)

    pairs = b"".join(text(key) + write(value) for key, value in entries.items())
    return b"\x80\x02}q\1(" + pairs + b"u."


def content(images: int, classes: int, seed: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (images, 3072), dtype=np.uint8)
    return pixels, random.permutation(np.arange(images) % classes).tolist()


def sizes(name: str) -> dict[str, int]:
    scale = 1 if name == "cifar10" else 10
    _, *train, test = FILES[name]
    return {file: scale * TRAIN // len(train) for file in train} | {test: scale * TEST}


def contents(name: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    classes = 10 if name == "cifar10" else 100
    return {
        file: content(images, classes, seed)
        for seed, (file, images) in enumerate(sizes(name).items())
    }


def write(root: Path, name: str, encode=python2) -> Path:
    folder, label = root / FILES[name][0], b"labels" if name == "cifar10" else b"fine_labels"
    folder.mkdir(parents=True, exist_ok=True)
    for file, (pixels, numbers) in contents(name).items():
        (folder / file).write_bytes(encode({b"batch_label": b"x", label: numbers, b"data": pixels}))
    return folder


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request, monkeypatch) -> str:
    scale = 1 if request.param == "cifar10" else 10
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", TRAIN * scale)
    monkeypatch.setattr(cifar, "TEST_IMAGES", TEST * scale)
    monkeypatch.delenv("BIASSHIFT_DATA", raising=False)
    return request.param


def load(name: str, root: Path, **options) -> data.DataSet:
    return getattr(data, name)(root, download=False, **options)


def one_message(error: BaseException) -> str:
    """The text of an error: one line, at most two sentences."""
    message = str(error)
    assert "\n" not in message and message.endswith(".") and message.count(". ") <= 1
    return message


# -- what they hold --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [None, 3, 4])
def test_what_was_written_is_read(name, tmp_path, protocol):
    def python3(entries: dict[bytes, object]) -> bytes:
        return pickle.dumps(
            {key.decode(): value for key, value in entries.items()}, protocol=protocol
        )

    write(tmp_path, name, python3 if protocol else python2)
    *train, (test_pixels, test_numbers) = contents(name).values()
    cifar_set = load(name, tmp_path)
    pixels = np.concatenate([pixels for pixels, _ in train])
    assert cifar_set.x_train.dtype == torch.uint8 and cifar_set.y_train.dtype == torch.int64
    # An image is 1,024 red values, 1,024 green, 1,024 blue, each row by row.
    assert cifar_set.x_train[3, 2, 5, 7].item() == pixels[3, 2 * 1024 + 5 * 32 + 7]
    assert np.array_equal(cifar_set.x_train.numpy().reshape(-1, 3072), pixels)
    assert cifar_set.y_train.tolist() == [label for _, numbers in train for label in numbers]
    assert np.array_equal(cifar_set.x_test.numpy().reshape(-1, 3072), test_pixels)
    assert cifar_set.y_test.tolist() == test_numbers
    assert (cifar_set.name, len(cifar_set.x_valid)) == (name, 0)
    assert cifar_set.classes == (10 if name == "cifar10" else 100)


def test_the_little_files_are_what_pickle_itself_reads(name, tmp_path):
    """Otherwise the tests of this file would be about a format of their own."""
    folder = write(tmp_path, name)
    for file, (pixels, _) in contents(name).items():
        entries = pickle.loads((folder / file).read_bytes(), encoding="bytes")
        assert np.array_equal(entries[b"data"], pixels)


def test_the_last_training_images_can_validate(name, tmp_path):
    write(tmp_path, name)
    whole, parted = load(name, tmp_path), load(name, tmp_path, valid=30)
    assert len(parted.x_valid) == 30
    assert torch.equal(torch.cat([parted.x_train, parted.x_valid]), whole.x_train)
    assert torch.equal(torch.cat([parted.y_train, parted.y_valid]), whole.y_train)
    assert torch.equal(parted.y_test, whole.y_test)
    for valid in (-1, len(whole.x_train)):
        with pytest.raises(ValueError, match=f"got {valid}"):
            load(name, tmp_path, valid=valid)


# -- download --------------------------------------------------------------------------------------


@pytest.mark.parametrize("download", [False, True])
def test_missing_files_without_a_network_are_one_message(name, tmp_path, monkeypatch, download):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError) as caught:
        getattr(data, name)(empty, download=download)
    message = one_message(caught.value)
    assert FILES[name][0] in message and "--data" in message and "$BIASSHIFT_DATA" in message
    assert not empty.exists()


def test_a_download_fills_in_what_is_missing_with_what_torchvision_wants_besides(
    name, tmp_path, monkeypatch
):
    extra = "batches.meta" if name == "cifar10" else "meta"

    def fetched(folder, download):
        (write(Path(folder), name) / extra).write_bytes(b"names")

    monkeypatch.setattr(torchvision.datasets, name.upper(), fetched)
    folder = write(tmp_path, name)
    (folder / FILES[name][-1]).unlink()
    assert len(getattr(data, name)(tmp_path).x_test) == sizes(name)[FILES[name][-1]]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES[name][1:], extra])


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_download_leaves_no_file(name, tmp_path, monkeypatch, stop):
    def half(folder, download):
        write(Path(folder), name)
        raise stop

    monkeypatch.setattr(torchvision.datasets, name.upper(), half)
    with pytest.raises((FileNotFoundError, KeyboardInterrupt)):
        getattr(data, name)(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- damaged ---------------------------------------------------------------------------------------


def wrong(pixels: np.ndarray, numbers: list[int], label: bytes) -> dict[str, bytes]:
    """Ways in which a file can be broken."""
    good = python2({label: numbers, b"data": pixels})
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><title>404</title>",
        "gzip": b"\x1f\x8b\x08\x00" + good,
        "no end": good[:-1],
        "half": good[: len(good) // 2],
        "list": b"\x80\x02].",
        "no pixels": python2({label: numbers}),
        "no labels": python2({b"data": pixels}),
        "pixels are text": python2({label: numbers, b"data": b"text"}),
        "pixels are unset": b"\x80\x02}(U\4datacnumpy.core.multiarray\n_reconstruct\n)RU"
        + struct.pack("<B", len(label))
        + label
        + b"](K\0eu.",
        "one image less": python2({label: numbers, b"data": pixels[:-1]}),
        "one pixel less": python2({label: numbers, b"data": pixels[:, :-1]}),
        "shape too large": good.replace(struct.pack("<H", 3072), struct.pack("<H", 3073)),
        "one label less": python2({label: numbers[:-1], b"data": pixels}),
        "label too large": python2({label: [*numbers[:-1], 200], b"data": pixels}),
        "labels are text": python2({label: b"text", b"data": pixels}),
        "floats": pickle.dumps(
            {label.decode(): numbers, "data": pixels.astype(np.float32)}, protocol=4
        ),
        "objects": pickle.dumps(
            {label.decode(): numbers, "data": np.array([[]], dtype=object)}, protocol=4
        ),
        "names are numbers": pickle.dumps({1: numbers}, protocol=2),
    }


@pytest.mark.parametrize("fault", wrong(*content(2, 2, 0), b"labels"))
def test_a_damaged_file_is_one_message_that_names_it(name, tmp_path, fault):
    folder = write(tmp_path, name)
    label = b"labels" if name == "cifar10" else b"fine_labels"
    for file in FILES[name][1:]:
        good = (folder / file).read_bytes()
        (folder / file).write_bytes(wrong(*contents(name)[file], label)[fault])
        with pytest.raises(RuntimeError) as caught:
            load(name, tmp_path)
        assert f"'{folder / file}'" in one_message(caught.value)
        (folder / file).write_bytes(good)


def test_classes_of_unequal_size_are_noticed(name, tmp_path):
    """What remains of a label in which a bit has flipped, and of a batch that is there twice."""
    folder = write(tmp_path, name)
    file = FILES[name][-1]
    pixels, numbers = contents(name)[file]
    numbers[0] = (numbers[0] + 1) % 10
    (folder / file).write_bytes(
        python2({b"labels": numbers, b"fine_labels": numbers, b"data": pixels})
    )
    with pytest.raises(RuntimeError, match="must hold 2 test images of every class") as caught:
        load(name, tmp_path)
    one_message(caught.value)


def test_what_is_not_a_file_or_too_large_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(RuntimeError, match="is not a file"):
            read_pickle(path)
    (tmp_path / "large").write_bytes(b"\x80\x02}.")
    with pytest.raises(RuntimeError, match="must have at most 3 bytes, got 4"):
        read_pickle(tmp_path / "large", max_bytes=3)


GOOD = python2({b"labels": [1, 2, 3], b"data": np.arange(6, dtype=np.uint8).reshape(3, 2)})


def read(tmp: Path, file: bytes) -> dict:
    (tmp / "file").write_bytes(file)
    return read_pickle(tmp / "file")


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_every_truncation_is_one_message(tmp_path, length):
    with pytest.raises(RuntimeError) as caught:
        read(tmp_path, GOOD[:length])
    one_message(caught.value)


@settings(max_examples=1000)
@given(
    place=st.integers(0, len(GOOD) * 8 - 1),
    other=st.integers(0, len(GOOD) - 1),
    byte=st.integers(0, 255),
)
def test_flipped_bits_and_bytes_give_a_dictionary_or_one_message(
    tmp_path_factory, place, other, byte
):
    file = bytearray(GOOD)
    file[place // 8] ^= 1 << place % 8
    file[other] = byte
    try:
        entries = read(tmp_path_factory.getbasetemp(), bytes(file))
    except RuntimeError as error:
        one_message(error)
    else:
        assert all(isinstance(key, str) for key in entries)


# -- malicious -------------------------------------------------------------------------------------


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(canary: Path) -> dict[str, bytes]:
    """Files that would make `canary`, each by another way in."""
    command = f"open({str(canary)!r}, 'w').close()"
    argument = b"X" + struct.pack("<I", len(command)) + command.encode()
    return {
        "protocol 0": pickle.dumps({"data": Calls(exec, command)}, protocol=0),
        "global": pickle.dumps({"data": Calls(exec, command)}, protocol=2),
        "stack global": pickle.dumps({"data": Calls(exec, command)}, protocol=4),
        "in a key": b"\x80\x02}cbuiltins\nexec\n" + argument + b"\x85RK\1s.",
        "inst": b"(" + argument + b"ibuiltins\nexec\n.",
        "obj": b"(cbuiltins\nexec\n" + argument + b"o.",
        "after numpy": GOOD[:-2] + b"U\1x" + b"cbuiltins\nexec\n" + argument + b"\x85Ru.",
    }


@pytest.mark.parametrize("way", payloads(Path("x")))
def test_what_a_file_calls_is_not_called(tmp_path, way):
    canary, control = tmp_path / "canary", tmp_path / "control"
    pickle.loads(payloads(control)[way])
    assert control.exists()  # the attack works on pickle itself
    with pytest.raises(RuntimeError) as caught:
        read(tmp_path, payloads(canary)[way])
    one_message(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    "function",
    [
        "os.system",
        "numpy.load",
        "numpy.fromfile",
        "builtins.getattr",
        "builtins.eval",
        "numpy.f2py",
    ],
)
def test_the_message_names_the_function(tmp_path, function):
    with pytest.raises(RuntimeError, match=function):
        read(tmp_path, b"\x80\x02}U\4datac" + function.replace(".", "\n").encode() + b"\ns.")


@pytest.mark.parametrize(
    "file",
    {
        "a function's defaults": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
        b"}(U\x0c__defaults__)ub.",
        "a function's slots": b"\x80\x02cnumpy\ndtype\nN}(U\x08__call__K\1u\x86b.",
        "the array type": b"\x80\x02cnumpy\nndarray\n}(U\1xK\1ub.",
        "a new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "an extension": b"\x80\x02\x82\1.",
        "a persistent id": b"\x80\x02U\1xQ.",
        "a buffer": b"\x80\x05\x97.",
        "an array of buffers": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",
        "a large memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a larger memo": b"}p99999999999999999999\n.",
        "deep tuples": b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\1s.",
        "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f]N.",
        "a huge string": b"\x80\x02}U\1xT\xff\xff\xff\x7fs.",
        "a long line": b"I" + b"9" * 100_000 + b"\n.",
        "an array of a terabyte": GOOD.replace(b"M\3\0M\2\0", b"\x8a\6\0\0\0\0\0\1M\2\0"),
        "a negative shape": GOOD.replace(b"M\3\0M\2\0", b"J\xfd\xff\xff\xffJ\xfe\xff\xff\xff"),
        "a list in itself": b"\x80\x02]q\1h\1a.",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_would_reach_further_is_refused(tmp_path, file):
    with pytest.raises(RuntimeError) as caught:
        read(tmp_path, file[1])
    one_message(caught.value)


def test_each_of_the_two_checks_refuses_a_call_without_the_other():
    """The check of the instructions, and that of the names."""
    file = payloads(Path("/nonexistent/canary"))["obj"]
    with pytest.raises(Refused):
        _inspect(file)
    with pytest.raises(Refused):
        _Unpickler(io.BytesIO(file)).load()
    with pytest.raises(Refused, match="no program"):
        _inspect(b"}r\xff\xff\xff\x7f.")


# -- the real ones ---------------------------------------------------------------------------------

PUBLISHED = {  # widely: mean and standard deviation of each channel
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_the_real_sets(data_root, name):
    if not (data_root / FILES[name][0]).exists():
        pytest.skip(f"no {FILES[name][0]} below '{data_root}'")
    real = getattr(data, name)(data_root, download=False)
    assert real.x_train.shape == (50_000, 3, 32, 32) and real.x_test.shape == (10_000, 3, 32, 32)
    counts = [x.flatten().bincount(minlength=256) for x in real.x_train.unbind(1)]
    shares = torch.stack(counts).double() / (50_000 * 1024)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, spread = PUBLISHED[name]
    assert (shares @ values).tolist() == pytest.approx(mean, abs=1e-4)
    deviations = (shares @ values**2 - (shares @ values) ** 2).sqrt()
    assert deviations.tolist() == pytest.approx(spread, abs=2e-4)
    first = {
        "cifar10": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1],
        "cifar100": [49, 33, 72, 51, 71, 92, 15, 14, 23, 0],
    }
    assert real.y_test[:10].tolist() == first[name]
