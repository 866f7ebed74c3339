"""Folders of images: which there are, what comes out of a file, and streams over them.

Second opinions: PIL, numpy and slices.
"""

import io
import os
import shutil
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biasshift import data
from biasshift.data import (
    CenterCrops,
    Crop,
    ImageNet,
    Images,
    ImageStream,
    Scale,
    image_folders,
    image_stream,
)
from biasshift.data.image_folders import photographs, read_photograph
from biasshift.data.stream import epoch_generator

# PyTorch on a machine with one core, and Python from 3.12 on about the worker processes of a
# DataLoader.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*use of fork"),
]

SIDE, SIZE = 12, 8
CROP = Crop(SIDE, SIZE)


def jpeg(size=(20, 14), mode="RGB", seed=0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image, file = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode), io.BytesIO()
    image.save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def png(size=(5, 4)) -> bytes:
    return jpeg(size, format="PNG")


def build(root: Path, classes=("n02", "n01", "n03"), train=4, val=2) -> Path:
    """Files of different content: class c's image i is made from the seed 100 c + i."""
    for split, count in (("train", train), ("val", val)):
        for place, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.JPEG").write_bytes(
                    jpeg(seed=1000 * (split == "val") + 100 * place + number)
                )
    return root


@pytest.fixture
def little(tmp_path) -> ImageNet:
    return data.imagenet(build(tmp_path / "little"))


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    monkeypatch.delenv("BIASSHIFT_DATA", raising=False)
    monkeypatch.setenv("BIASSHIFT_CACHE", str(tmp_path / "cache"))


def one_message(error: BaseException) -> str:
    """The text of an error: one line, at most two sentences."""
    message = str(error)
    assert "\n" not in message and message.endswith(".") and message.count(". ") <= 1
    return message


# -- folders ---------------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(little, tmp_path):
    assert little.classes == 3 and little.folders == little.names == ("n01", "n02", "n03")
    assert len(little.train) == 12 and len(little.valid) == 6
    for split, name in ((little.train, "train"), (little.valid, "val")):
        for path, label in zip(split.paths, split.y.tolist(), strict=True):
            assert Path(path).parent == tmp_path / "little" / name / little.folders[label]


def test_hidden_folders_are_not_classes(tmp_path):
    (build(tmp_path / "little") / "train" / ".cache").mkdir()
    assert data.imagenet(tmp_path / "little").classes == 3


def test_the_mapping_gives_order_and_names(tmp_path):
    root = build(tmp_path / "mapped")
    (root / image_folders.MAPPING).write_text("n03 fox, red one\nn00 owl\n\nn01 cat\nn02\n")
    present = data.imagenet(root)
    assert present.classes == 3 and present.folders == ("n03", "n01", "n02")
    assert present.names == ("fox, red one", "cat", "n02")
    folders = [Path(path).parent.name for path in present.train.paths]
    numbers = present.train.y.tolist()
    assert {name for name, number in zip(folders, numbers, strict=True) if number == 0} == {"n03"}
    whole = data.imagenet(root, numbering="mapping")
    assert (whole.classes, whole.folders) == (4, ("n03", "n00", "n01", "n02"))
    assert sorted(set(whole.train.y.tolist())) == [0, 2, 3]
    assert whole.train.paths == present.train.paths


def test_the_folder_is_found_by_argument_variable_and_name(tmp_path, monkeypatch):
    build(tmp_path / "imagenet")
    for root in (tmp_path, tmp_path / "imagenet"):
        assert len(data.imagenet(root).train) == 12
    monkeypatch.setenv("BIASSHIFT_DATA", str(tmp_path))
    assert len(data.imagenet().valid) == 6
    monkeypatch.delenv("BIASSHIFT_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/imagenet/train"):
        data.imagenet()


def break_folders(root: Path, fault: str) -> str:
    """Breaks the folders and returns what the message must name."""
    if fault == "no val":
        shutil.rmtree(root / "val")
        return f"'{root / 'val'}' cannot be read (No such file or directory)"
    if fault == "flat val":
        shutil.rmtree(root / "val")
        (root / "val").mkdir()
        (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
        return "has no folder per class"
    if fault == "val is a file":
        shutil.rmtree(root / "val")
        (root / "val").write_text("")
        return "Not a directory"
    if fault == "class missing in val":
        shutil.rmtree(root / "val" / "n02")
        return "class 'n02' in train/ and not in val/"
    if fault == "class missing in train":
        shutil.rmtree(root / "train" / "n01")
        return "class 'n01' in val/ and not in train/"
    if fault == "empty class":
        for file in (root / "val" / "n03").iterdir():
            file.rename(file.with_suffix(""))
        return "no images of the class 'n03'"
    text, named = {
        "unlisted": (b"n01 a\nn02 b\n", "'n03'"),
        "twice": (b"n01 a\nn02 b\nn03 c\nn01 d\n", "a class twice"),
        "binary": (b"\xff\xfe\x00n01", "cannot be read as text"),
    }[fault]
    (root / image_folders.MAPPING).write_bytes(text)
    return named


@pytest.mark.parametrize(
    "fault",
    [
        "no val",
        "flat val",
        "val is a file",
        "class missing in val",
        "class missing in train",
        "empty class",
        "unlisted",
        "twice",
        "binary",
    ],
)
def test_folders_that_are_not_whole_are_one_message(tmp_path, fault):
    named = break_folders(build(tmp_path / "little"), fault)
    with pytest.raises((RuntimeError, FileNotFoundError)) as caught:
        data.imagenet(tmp_path / "little")
    assert named in one_message(caught.value)


def test_a_numbering_without_its_mapping_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=image_folders.MAPPING):
        data.imagenet(build(tmp_path / "little"), numbering="mapping")


def test_a_sample_is_of_different_images_and_the_same_every_time(little):
    before = torch.get_rng_state()
    sample, again = little.train.sample(5), little.train.sample(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample.paths == again.paths != little.train.sample(5, seed=1).paths
    assert len(set(sample.paths)) == 5
    labels = dict(zip(little.train.paths, little.train.y.tolist(), strict=True))
    assert [labels[path] for path in sample.paths] == sample.y.tolist()
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"'count' must be from 1 to 12 images, got {count}"):
            little.train.sample(count)


# -- files -----------------------------------------------------------------------------------------


def written(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "image.JPEG").write_bytes(content)
    return str(tmp_path / "image.JPEG")


def test_an_image_is_squeezed_to_a_square(tmp_path):
    path = written(tmp_path, png((20, 14)))
    image = read_photograph(path, 7)
    expected = np.asarray(Image.open(path).convert("RGB").resize((7, 7), Image.Resampling.BILINEAR))
    assert image.dtype == torch.uint8 and image.shape == (3, 7, 7) and image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    square = read_photograph(written(tmp_path, png((6, 6))), 6)
    assert np.array_equal(square.permute(1, 2, 0), np.asarray(Image.open(path).convert("RGB")))


def test_gray_images_have_three_equal_channels(tmp_path):
    red, green, blue = read_photograph(written(tmp_path, jpeg(mode="L")), 9)
    assert torch.equal(red, green) and torch.equal(red, blue) and red.float().std() > 0


@pytest.mark.parametrize(
    "content",
    [
        jpeg(mode="CMYK"),
        jpeg(progressive=True),
        jpeg(format="PNG", mode="P"),
        jpeg(format="PNG", mode="1"),
    ],
)
def test_other_kinds_of_jpeg_and_png_are_color_images_too(tmp_path, content):
    assert read_photograph(written(tmp_path, content), 9).shape == (3, 9, 9)


def raw_png(width, height, bits, color, rows: bytes, interlaced=0) -> bytes:
    """The PNG format by hand: signature, header, packed rows, end."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def large_png(side: int) -> bytes:
    """A few bytes that unpack to side² pixels."""
    return raw_png(side, side, 1, 0, b"")


@pytest.mark.parametrize("low", [0, 30_000, 65_000])
def test_gray_images_of_16_bits_keep_their_brightness(tmp_path, low):
    """Written byte by byte, without Pillow; 65,535 is white, as 255 is in 8 bits."""
    high = min(low + 20_000, 65_536)
    gray = np.random.default_rng(0).integers(low, high, (20, 30)).astype(">u2")
    gray[0, 0], gray[0, 1] = 0, 65_535
    rows = b"".join(b"\0" + row.tobytes() for row in gray)
    image = read_photograph(written(tmp_path, raw_png(30, 20, 16, 0, rows)), 20)
    whole = Image.fromarray(np.rint(gray / 257).astype(np.uint8))
    expected = np.asarray(whole.resize((20, 20), Image.Resampling.BILINEAR))
    assert all(np.array_equal(channel, expected) for channel in image.numpy())
    assert abs(image.float().mean() - gray.mean() / 257) < 2
    square = raw_png(2, 2, 16, 0, b"\0" + gray[0, :2].tobytes() + b"\0" + gray[0, 1::-1].tobytes())
    assert read_photograph(written(tmp_path, square), 2)[0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(
    ("bits", "color", "pixel_bits"),
    [(1, 0, 1), (2, 0, 2), (8, 0, 8), (16, 0, 16), (8, 2, 24), (16, 2, 48), (8, 4, 16), (8, 6, 32)],
)
def test_a_png_without_some_of_its_rows_is_one_message(
    tmp_path, bits, color, pixel_bits, interlaced
):
    """All chunks are there, and their checksums are right: fewer rows are packed in them."""
    side = 8
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)] if interlaced else [(8, 8)]
    rows = [b"\0" * (1 + (width * pixel_bits + 7) // 8) for width, n in passes for _ in range(n)]
    whole = raw_png(side, side, bits, color, b"".join(rows), interlaced)
    assert read_photograph(written(tmp_path, whole), 9).max() == 0
    for kept in (len(rows) - 1, len(rows) // 2, 1, 0):
        half = raw_png(side, side, bits, color, b"".join(rows[:kept]), interlaced)
        path = written(tmp_path, half)
        with pytest.raises(RuntimeError, match="cannot be read as an image") as caught:
            read_photograph(path, 9)
        assert f"'{path}'" in one_message(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 2), (33, 17)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_whole_pngs_of_any_size_are_read(tmp_path, mode, size):
    content = io.BytesIO()
    Image.new(mode, size).save(content, "PNG")
    assert read_photograph(written(tmp_path, content.getvalue()), 4).shape == (3, 4, 4)


BROKEN = {
    "empty": b"",
    "text": b"<!DOCTYPE html><title>404</title>",
    "half": jpeg()[: len(jpeg()) // 2],
    "header alone": jpeg()[:100],
    "half a png": png()[:60],
    "a gif": jpeg(format="GIF", mode="P"),
    "a postscript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
    "11,000 pixels squared": large_png(11_000),
    "100,000 pixels squared": large_png(100_000),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_image_is_one_message_that_names_it(tmp_path, fault):
    path = written(tmp_path, BROKEN[fault])
    refusal = "cannot be read as an image|more than is safe"
    with pytest.raises(RuntimeError, match=refusal) as caught:
        read_photograph(path, 9)
    assert f"'{path}'" in one_message(caught.value)


def test_what_would_unpack_to_gigabytes_is_refused_before(tmp_path):
    with pytest.raises(RuntimeError, match="11000 × 11000 pixels, more than is safe to unpack"):
        read_photograph(written(tmp_path, large_png(11_000)), 9)


def test_what_is_not_a_file_is_one_message(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "gone", tmp_path):
        with pytest.raises(RuntimeError, match="is not a file, or has been deleted"):
            read_photograph(str(path), 9)


def test_every_truncation_and_every_flipped_byte_is_an_image_or_one_message(tmp_path):
    good = jpeg((8, 8))
    random = np.random.default_rng(0)
    damaged = [good[:length] for length in range(0, len(good), 7)]
    for place in random.integers(0, len(good), 200):
        damaged.append(good[:place] + bytes([random.integers(256)]) + good[place + 1 :])
    for content in damaged:
        try:
            assert read_photograph(written(tmp_path, content), 9).shape == (3, 9, 9)
        except RuntimeError as error:
            one_message(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_met_as_one_message_wherever_it_is_loaded(little, workers):
    broken = little.train.paths[5]
    Path(broken).write_bytes(jpeg()[:300])
    stream = ImageStream(little.train, 3, 0, crop=CROP, workers=workers)
    with pytest.raises(RuntimeError) as caught:
        list(stream.epoch(1))
    assert f"'{broken}'" in one_message(caught.value)


def test_a_worker_that_is_killed_is_one_message(little, monkeypatch):
    monkeypatch.setattr("biasshift.data.image_folders.read_photograph", lambda *args: os._exit(1))
    with pytest.raises(RuntimeError, match="was killed, perhaps for want of memory") as caught:
        list(ImageStream(little.train, 3, 0, crop=CROP, workers=1).epoch(1))
    one_message(caught.value)


# -- streams ---------------------------------------------------------------------------------------


def same(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def decoded(images: Images) -> torch.Tensor:
    return torch.stack([read_photograph(path, SIDE) for path in images.paths])


def test_a_crop_is_a_slice_of_its_image_mirrored_or_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (500, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    draws = CROP.draw(500, torch.Generator().manual_seed(1))
    cropped = CROP.apply(x, draws).numpy()
    for image, (row, column, mirrored), crop in zip(
        x.numpy(), draws.tolist(), cropped, strict=True
    ):
        expected = image[:, row : row + SIZE, column : column + SIZE]
        assert np.array_equal(crop, expected[:, :, ::-1] if mirrored else expected)
    assert set(map(tuple, draws.tolist())) == set(product(range(5), range(5), range(2)))
    assert not Crop(SIDE, SIZE, flip=False).draw(200, torch.Generator())[:, 2].any()
    assert torch.equal(CROP.apply(x, CROP.center(500)), x[:, :, 2:-2, 2:-2])
    assert torch.equal(Crop(SIDE, SIDE, flip=False).apply(x, Crop(SIDE, SIDE).center(500)), x)
    for size in (0, SIDE + 1):
        with pytest.raises(ValueError, match=f"from 1 to {SIDE} pixels.*got {size}"):
            Crop(SIDE, size)


def test_an_epoch_shows_every_image_once_cropped_as_drawn_for_it(little):
    """Against slices of the prepared images: a mean per pixel is subtracted before the crop."""
    mean = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    stream = ImageStream(little.train, 5, seed=3, prepare=Scale(mean=mean), crop=CROP, workers=0)
    shown = list(stream.epoch(2))
    assert [len(y) for _, y in shown] == [5, 5, 2] and len(stream) == 3
    x, y = (torch.cat(parts) for parts in zip(*shown, strict=True))
    images = decoded(little.train) / 255.0 - mean
    generator = epoch_generator(3, 2)
    order, draws = torch.randperm(12, generator=generator), CROP.draw(12, generator)
    assert torch.equal(y, little.train.y[order])
    for crop, number in zip(x, order.tolist(), strict=True):
        row, column, mirrored = draws[number].tolist()
        expected = images[number, :, row : row + SIZE, column : column + SIZE]
        assert torch.equal(crop, expected.flip(2) if mirrored else expected)


def test_workers_and_their_number_do_not_matter_and_the_global_generator_is_left_alone(little):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    without, one_worker, two_workers = (
        list(ImageStream(little.train, 5, 0, crop=CROP, workers=workers).epoch(1))
        for workers in (0, 1, 2)
    )
    assert same(without, one_worker) and same(without, two_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_epoch_goes_on_where_it_stopped_without_opening_what_is_skipped(little):
    stream = ImageStream(little.train, 5, 0, crop=CROP, workers=0)
    whole = list(stream.epoch(4))
    assert not same(whole, list(stream.epoch(5)))
    order = torch.randperm(12, generator=epoch_generator(0, 4)).tolist()
    for number in order[:10]:
        Path(little.train.paths[number]).unlink()
    assert same(stream.epoch(4, start=2), whole[2:]) and list(stream.epoch(4, start=3)) == []


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_what_one_alone_would(little, world):
    def epoch(**options):
        return list(ImageStream(little.train, 8, 0, crop=CROP, workers=0, **options).epoch(1))

    shares = [epoch(rank=rank, world=world) for rank in range(world)]
    together = [
        tuple(torch.cat(parts) for parts in zip(*batch, strict=True))
        for batch in zip(*shares, strict=True)
    ]
    assert same(epoch(), together)


def test_center_crops_are_all_images_in_order(little):
    crops = CenterCrops(little.valid, 4, crop=CROP, workers=0)
    images = decoded(little.valid)[:, :, 2:-2, 2:-2] / 255.0
    for _ in range(2):
        x, y = (torch.cat(parts) for parts in zip(*crops, strict=True))
        assert torch.equal(x, images) and torch.equal(y, little.valid.y)
    shares = [
        CenterCrops(little.valid, 4, crop=CROP, workers=0, rank=rank, world=7) for rank in range(7)
    ]
    assert torch.equal(torch.cat([y for share in shares for _, y in share]), little.valid.y)
    assert list(shares[6]) == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "at least 1"),
        (
            {"batch_size": 11, "world": 2},
            "a batch of 1 of the 12 examples, in which some of the 2 processes have no share",
        ),
        ({"seed": -1}, "negative"),
        ({"workers": -1}, "'workers' must be 0 or more"),
        ({"batch_size": 13, "drop_last": True}, "at most the 12 examples, got 13"),
    ],
)
def test_streams_that_cannot_be_are_refused(little, options, word):
    with pytest.raises(ValueError, match=word):
        ImageStream(little.train, **{"batch_size": 4, "seed": 0} | options)


def test_epochs_that_do_not_exist_are_refused(little):
    stream = ImageStream(little.train, 4, 0, crop=CROP, workers=0)
    with pytest.raises(ValueError, match="at least 1, the first epoch, got 0"):
        stream.epoch(0)
    with pytest.raises(ValueError, match="from 0 to 3, the batches of an epoch, got 4"):
        stream.epoch(1, 4)


# -- the mean --------------------------------------------------------------------------------------


def test_the_mean_image_is_that_of_numpy(little, monkeypatch):
    monkeypatch.setattr(image_stream, "CHUNK", 5)
    done = []
    mean = data.mean_image(little.train, SIDE, workers=0, on_batch=done.append)
    expected = decoded(little.train).numpy().mean(0) / 255
    assert mean.dtype == torch.float32 and np.allclose(mean, expected, atol=1e-7)
    assert done == [5, 10, 12]


def test_the_mean_image_is_computed_once_for_the_same_files(little):
    done = []

    def mean(images: Images) -> torch.Tensor:
        return data.mean_image(images, SIDE, workers=0, on_batch=done.append)

    first = mean(little.train)
    assert torch.equal(first, mean(little.train)) and done == [12]
    Path(little.train.paths[0]).write_bytes(jpeg((9, 9), seed=99))
    assert not torch.equal(mean(little.train), first)
    assert mean(little.train.sample(5)).shape == (3, SIDE, SIDE)
    assert done == [12, 12, 5]


def test_a_deleted_file_is_one_message(little):
    Path(little.train.paths[3]).unlink()
    with pytest.raises(RuntimeError) as caught:
        data.mean_image(little.train, SIDE, workers=0)
    assert little.train.paths[3] in one_message(caught.value)


# -- the real ones ---------------------------------------------------------------------------------


@pytest.mark.data
def test_ten_real_classes(data_root):
    root = data_root / "imagenet-like"
    if not root.exists():
        pytest.skip(f"no imagenet-like below '{data_root}'")
    real = data.imagenet(root)
    assert real.classes == 10 and len(real.train) >= 1000 and real.train.y.bincount().min() > 0
    sample = real.train.sample(60)
    mean = data.mean_image(sample, 256, workers=0)
    # ImageNet's, widely published; of 60 images
    assert mean.mean((1, 2)).tolist() == pytest.approx([0.485, 0.456, 0.406], abs=0.06)
    x, y = next(ImageStream(sample, 30, 0, prepare=Scale(mean=mean), workers=2).epoch(1))
    assert x.shape == (30, 3, 224, 224) and y.max() < 10 and abs(x.mean().item()) < 0.1
    every, numbers = Images(real.valid.paths, real.valid.y), list(range(0, len(real.valid), 5))
    grey = sum(
        bool(torch.equal(x[0, 0], x[0, 1]))
        for x, _ in photographs(every, [[number] for number in numbers], 64, 0)
    )
    assert grey < len(numbers) / 10
