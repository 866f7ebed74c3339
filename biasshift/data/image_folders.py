"""Folders of image files in ImageNet's layout: which there are, and what each holds.

`imagenet` reads the folders alone, before any image is opened. `photographs` opens and decodes the
files, which may come from anywhere: each is checked, and one that is not an image is named.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biasshift.data.dataset import data_root
from biasshift.data.ordinary_files import open_ordinary, read_ordinary

EXTENSIONS = (".jpeg", ".jpg", ".png")
FORMATS = ("JPEG", "PNG")  # one of ImageNet's .JPEG files is a PNG
# ImageNet's 1,000 classes in order, a line each: "n01440764 tench, Tinca tinca".
MAPPING = "LOC_synset_mapping.txt"
MAPPING_BYTES = 2**20
# A few hundred bytes may unpack to more than the memory; ImageNet's largest has 19 million. The
# same holds for an image that is squeezed to its width first, and stays as high as it was.
MAX_PIXELS = 100_000_000
DEFLATE = 1032  # bytes at most that a byte of a PNG unpacks to
BESIDES = 2**24  # bytes at most of a PNG that are not pixels, but notes and previews
# First column and row of each pass of an interlaced PNG, and the steps from there.
INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
INTERLACED += ((0, 1, 1, 2),)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its color type
WORKERS = min(4, os.cpu_count() or 1)


# -- which images there are ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """Image files and the numbers of their classes."""

    paths: tuple[str, ...]
    y: Int[Tensor, " images"]

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self, count: int, seed: int = 0) -> "Images":
        """Returns `count` of the images at random, each at most once, in their own order.

        Args:
            seed: the same seed takes the same images; the global random state is untouched.

        Raises:
            ValueError: there are fewer, or `count` is not positive.
        """
        if not 0 < count <= len(self):
            raise ValueError(f"'count' must be from 1 to {len(self)} images, got {count}.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = order[:count].sort().values
        return Images(tuple(self.paths[i] for i in chosen.tolist()), self.y[chosen])


@dataclass(frozen=True, eq=False)
class ImageNet:
    """Two splits of image files.

    ImageNet's validation images are the paper's test set: nobody else has labels for the real one.

    Args:
        classes: how many outputs a network for them has.
        folders: the name of each class's folder, a WordNet number in ImageNet, by class number.
        names: in English where `LOC_synset_mapping.txt` is there, else the folder's name.
    """

    name: str
    classes: int
    folders: tuple[str, ...]
    names: tuple[str, ...]
    train: Images
    valid: Images


def imagenet(
    root: str | Path | None = None, numbering: Literal["folders", "mapping"] = "folders"
) -> ImageNet:
    """Returns the images below `train/<class>/` and `val/<class>/`.

    Only folders are read; a file that is not an image is reported when it is loaded.

    Args:
        root: the folder that holds `train/` and `val/`, or one that holds them in `imagenet/`.
            Default: `$BIASSHIFT_DATA`, else `./data`.
        numbering: "folders" numbers the classes that are there, so that ten folders make ten
            classes: in the order of `LOC_synset_mapping.txt` where it lies beside `train/`, else by
            name, which is ImageNet's order too. "mapping" gives every class its number in that
            file.

    Raises:
        FileNotFoundError: the folders are not there, or the mapping that was asked for.
        RuntimeError: the two splits have other classes, a class has no images, or the mapping is
            not one.
    """
    base = data_root(root)
    folder = base if (base / "train").is_dir() else base / "imagenet"
    train, valid = (_class_folders(folder / split) for split in ("train", "val"))
    if unpaired := sorted(train ^ valid):
        present, missing = ("train", "val") if unpaired[0] in train else ("val", "train")
        raise RuntimeError(
            f"'{folder}' has the class '{unpaired[0]}' in {present}/ and not in {missing}/. Copy "
            "both splits anew."
        )
    order, names = _order(folder, train, numbering)
    number = {name: place for place, name in enumerate(order) if name in train}
    splits = [_images(folder / split, number) for split in ("train", "val")]
    return ImageNet(folder.name, len(order), tuple(order), tuple(names), *splits)


def _class_folders(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            names = {
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            }
    except OSError as error:
        raise FileNotFoundError(
            f"'{folder}' cannot be read ({error.strerror}). "
            "Name the folder that holds train/ and val/ with --data or $BIASSHIFT_DATA."
        ) from error
    if not names:
        raise RuntimeError(
            f"'{folder}' has no folder per class. ImageNet's validation images come in one: sort "
            "them into folders first."
        )
    return names


def _order(folder: Path, present: set[str], numbering: str) -> tuple[list[str], list[str]]:
    """The classes' folders and names, by number."""
    path = folder / MAPPING
    if not os.path.lexists(path):
        if numbering == "mapping":
            raise FileNotFoundError(
                f"'{path}' is missing, which numbers the classes. Put it there, or number them by "
                "folders."
            )
        return sorted(present), sorted(present)
    listed = _read_mapping(path)
    if unlisted := sorted(present - set(listed)):
        raise RuntimeError(
            f"'{folder}' has the class folder '{unlisted[0]}', which {MAPPING} does not list. "
            "Rename or remove one of them."
        )
    order = [name for name in listed if numbering == "mapping" or name in present]
    return order, [listed[name] for name in order]


def _read_mapping(path: Path) -> dict[str, str]:
    try:
        lines = read_ordinary(path, MAPPING_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeError(
            f"'{path}' cannot be read as text. Delete it or copy it anew."
        ) from error
    pairs = [line.strip().partition(" ") for line in lines if line.strip()]
    listed = {wnid: name or wnid for wnid, _, name in pairs}
    if len(listed) != len(pairs):
        raise RuntimeError(f"'{path}' lists a class twice. Delete it or copy it anew.")
    return listed


def _images(folder: Path, number: dict[str, int]) -> Images:
    paths, labels = [], []
    for name in sorted(number):
        try:
            found = _image_files(str(folder / name))
        except OSError as error:
            raise RuntimeError(
                f"'{error.filename or folder}' cannot be read: {error.strerror}."
            ) from error
        if not found:
            raise RuntimeError(
                f"'{folder}' has no images of the class '{name}' ({', '.join(EXTENSIONS)}). Copy "
                "it anew, or remove the folder."
            )
        paths += found
        labels += [number[name]] * len(found)
    return Images(tuple(paths), torch.tensor(labels))


def _image_files(top: str) -> list[str]:
    """The images in a folder and below it, in torchvision's order.

    Links to folders are followed, each folder once: a link may lead to where it lies.
    """
    entered, waiting, found = set(), [top], []
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in entered:
            continue
        entered.add(place)
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
        waiting += [os.path.join(folder, name) for name, below in reversed(names) if below]
        files = [name for name, below in names if not below and name.lower().endswith(EXTENSIONS)]
        found.append((folder, [os.path.join(folder, name) for name in files]))
    return [path for _, files in sorted(found) for path in files]


# -- image files as tensors ------------------------------------------------------------------------


def read_photograph(path: str, side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """Returns the image in red, green and blue, squeezed to `side` × `side` pixels.

    Gray images have three equal channels, and those of 16 bits are scaled to 8. Only JPEG and PNG
    are decoded, by Pillow, and only images of at most `MAX_PIXELS` pixels.

    Raises:
        RuntimeError: the file cannot be read, or is not a whole JPEG or PNG image.
    """
    from PIL import Image

    if not os.path.isfile(path):  # a pipe would be waited for
        raise RuntimeError(f"'{path}' is not a file, or has been deleted.")
    try:
        with warnings.catch_warnings(), open_ordinary(path) as file:
            # Of damaged notes about the camera, and of many pixels, which are counted below.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                if max(image.width, side) * image.height > MAX_PIXELS:
                    raise RuntimeError(
                        f"'{path}' is an image of {image.width} × {image.height} pixels, more than "
                        "is safe to unpack."
                    )
                if image.format == "PNG" and not _has_a_likely_size(file):
                    raise ValueError("Rows are missing, or more is there.")  # before it is read
                if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                    image.load()
                    colored = Image.fromarray(_in_8_bits(np.asarray(image))).convert("RGB")
                else:
                    colored = image.convert("RGB")
                if image.format == "PNG" and not _has_all_rows(file):
                    raise ValueError("Rows are missing.")  # which Pillow leaves black
                pixels = np.array(colored.resize((side, side), Image.Resampling.BILINEAR))
    except RuntimeError:
        raise
    except Exception as error:  # which one depends on the byte that is wrong
        reason = getattr(error, "strerror", None) or "it is damaged, cut short, or something else"
        raise RuntimeError(
            f"'{path}' cannot be read as an image ({reason}). Delete the file or copy it anew."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    scaled = np.empty(pixels.shape, np.uint8)
    for row, line in zip(scaled, pixels, strict=True):  # all at once would take 16 bytes a pixel
        row[:] = np.rint(line / 257)
    return scaled


def _has_a_likely_size(file: BinaryIO) -> bool:
    """Whether a PNG can hold the pixels that its header says, and hardly more; the place is kept.

    Pillow takes memory for the rows that are missing, and reads what is too much.
    """
    place, size = file.tell(), os.fstat(file.fileno()).st_size
    needed = next((_promised(file) for kind, _ in _chunks(file) if kind == b"IHDR"), 0)
    file.seek(place)
    return needed <= DEFLATE * size and size <= needed + needed // 100 + BESIDES


def _has_all_rows(file: BinaryIO) -> bool:
    """Whether the compressed pixels of a PNG are as many as its header says."""
    unpacked, needed, stream = 0, 0, zlib.decompressobj()
    for kind, length in _chunks(file):
        if kind == b"IHDR":
            needed = _promised(file)
        while kind == b"IDAT" and length and not stream.eof and unpacked < needed:
            content = file.read(min(length, 2**20))
            length = length - len(content) if content else 0
            while content and not stream.eof and unpacked < needed:
                unpacked += len(stream.decompress(content, 2**20))
                content = stream.unconsumed_tail
    return unpacked >= needed


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk of a PNG; the file then stands in front of its content."""
    file.seek(8)
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        place = file.tell()
        yield kind, length
        file.seek(place + length + 4)


def _promised(file: BinaryIO) -> int:
    return _unpacked_size(*struct.unpack(">IIBBxxB", file.read(13)))


def _unpacked_size(width: int, height: int, bits: int, color: int, interlaced: int) -> int:
    """The bytes of all rows of a PNG, each with the byte for its filter."""
    size = 0
    for column, row, right, down in INTERLACED if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((column - width) // right), -((row - height) // down)
        if columns > 0 and rows > 0:
            size += rows * (1 + (columns * bits * CHANNELS[color] + 7) // 8)
    return size


class _Files(Dataset):
    """What the worker processes do. Errors travel as text: raised there, they would arrive as a
    page of two processes' lines.
    """

    def __init__(self, paths: Sequence[str], side: int):
        self.paths, self.side = paths, side

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return read_photograph(self.paths[number], self.side)
        except RuntimeError as error:
            return str(error)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    wrong = [item for item in items if isinstance(item, str)]
    return wrong[0] if wrong else torch.stack([item for item in items if isinstance(item, Tensor)])


def photographs(
    images: Images,
    batches: list[list[int]],
    side: int,
    workers: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[UInt8[Tensor, "batch 3 {side} {side}"], Int[Tensor, " batch"]]]:
    """Yields batches (x, y) of the images with the given numbers, in the given order.

    Args:
        batches: the numbers of the images of each batch.
        side: height and width to which images are squeezed, see `read_photograph`.
        workers: processes that decode ahead of whoever iterates; 0 decodes here.
        device: of x and y; the files are decoded on the CPU.

    Raises:
        RuntimeError: a file is not an image, which the message names; or a worker process was
            killed.
    """
    loader = DataLoader(
        _Files(images.paths, side),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=torch.device(device).type == "cuda",
        # The workers' seeds, which nobody uses; else the global generator is drawn from.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        for numbers, x in zip(batches, loader, strict=True):
            if isinstance(x, str):
                raise RuntimeError(x)
            y = images.y[torch.as_tensor(numbers)]
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            "A process that loads images was killed, perhaps for want of memory. Take fewer "
            "workers."
        ) from error
