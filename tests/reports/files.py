"""What comes from files and the command line, and a figure in which no unit qualifies."""

import gzip
import io
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import torch
from torch import Tensor

from .table import refusal, report

# -- images ----------------------------------------------------------------------------------------


def gray_png(values: Tensor, rows: int | None = None) -> bytes:
    """A PNG with 16 bits of gray, by hand: signature, header, packed rows, end."""
    height, width = values.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    packed = b"".join(
        b"\0" + struct.pack(f">{width}H", *row) for row in values.tolist()[: rows or height]
    )
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(packed))
        + chunk(b"IEND", b"")
    )


@contextmanager
def written(content: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        path.write_bytes(content)
        yield str(path)


@report("PNG", 0, 30_000, 60_000, tolerance=0.02)
def of_16_bits_keeps_its_brightness(low: int) -> tuple[float, float]:
    from biasshift.data.image_folders import read_photograph

    values = torch.randint(low, low + 5_500, (20, 20))
    with written(gray_png(values)) as path:
        return float(read_photograph(path, 20).double().mean()), float(values.double().mean() / 257)


@report("PNG", "rows are missing", "the file ends early", "only the header")
def truncated(how: str) -> tuple[str, re.Pattern]:
    from biasshift.data.image_folders import read_photograph

    values = torch.randint(0, 65_536, (20, 20))
    content = gray_png(values, rows=7 if how == "rows are missing" else None)
    content = {
        "the file ends early": content[: len(content) // 2],
        "only the header": content[:33],
    }.get(how, content)
    with written(content) as path:
        said = refusal(lambda: read_photograph(path, 9))
    return said, re.compile(r"RuntimeError: .*image\.png.* cannot be read as an image")


# -- MNIST -----------------------------------------------------------------------------------------

SHAPES = {
    "train-images-idx3-ubyte": (12, 28, 28),
    "train-labels-idx1-ubyte": (12,),
    "t10k-images-idx3-ubyte": (5, 28, 28),
    "t10k-labels-idx1-ubyte": (5,),
}


@report("MNIST")
def as_four_gz_files() -> tuple[dict, dict]:
    """Twelve images, of which nine are for training; nothing is unpacked, no network is there."""
    from biasshift.data import handwritten_digits

    values = {
        name: torch.randint(256 if len(shape) == 3 else 10, shape) for name, shape in SHAPES.items()
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(handwritten_digits, "MNIST_FILES", SHAPES),
        mock.patch.object(handwritten_digits, "MNIST_TRAIN", 9),
        mock.patch("urllib.request.urlopen", side_effect=URLError("no network")),
    ):
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, tensor in values.items():
            header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
            packed = gzip.compress(header + bytes(tensor.flatten().tolist()))
            (raw / f"{name}.gz").write_bytes(packed)
        data = handwritten_digits.mnist(folder, download=False)
        assert all(path.suffix == ".gz" for path in raw.iterdir())
    images, labels, test, test_labels = values.values()
    found = {
        "train": data.x_train,
        "train labels": data.y_train,
        "validation": data.x_valid,
        "validation labels": data.y_valid,
        "test": data.x_test,
        "test labels": data.y_test,
    }
    return found, {
        "train": images[:9].flatten(1).float() / 255,
        "train labels": labels[:9],
        "validation": images[9:].flatten(1).float() / 255,
        "validation labels": labels[9:],
        "test": test.flatten(1).float() / 255,
        "test labels": test_labels,
    }


# -- the command line ------------------------------------------------------------------------------


@report("--device", "mps", "xpu", "gpu", "cuda:99")
def that_is_not_there(device: str) -> tuple[str, re.Pattern]:
    from biasshift import cli

    output, status = io.StringIO(), 0
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(output), redirect_stdout(output):
        try:
            cli.main(["train", "mnist", "--device", device, "--out", folder])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    said = f"{status}: {' '.join(output.getvalue().split())}"
    return said, re.compile(r"^[12]: .*--device.* must be ")


# -- figures ---------------------------------------------------------------------------------------


@report("figure theory2")
def without_qualifying_later_units() -> tuple[dict, dict]:
    """Behind the first step all units have too few samples; k is 0.5 at the first."""
    import pandas as pd

    from biasshift import figures

    rows = []
    for seed in range(2):
        for step in (0, 25, 50, 75, 100):
            for layer in ("2", "4"):
                common = {
                    "run": f"elu-{seed}",
                    "experiment": "planted",
                    "activation": "elu",
                    "seed": seed,
                    "step": step,
                    "epoch": step / 25,
                    "layer": layer,
                    "finished": True,
                }
                rows.append({**common, "unit": -1, "inputs": 3.0})
                samples = 300.0 if step == 0 else 1.0
                rows += [
                    {
                        **common,
                        "unit": unit,
                        "k": 0.5,
                        "coupling": 0.5,
                        "effective_samples": samples,
                        "norm_mean_p": 1.0,
                        "norm_mean_q": 1.0,
                        "norm_corrected_mean": 0.4,
                        "inputs": 3.0,
                    }
                    for unit in range(3)
                ]
    small = figures.condensed("theory2", pd.DataFrame(rows))
    figure = figures.picture("theory2", small)
    enough = figure.axes[2].lines[0].get_ydata()
    here = {number.quantity: number.here for number in figures.numbers("theory2", small)}
    said = [text for quantity, text in here.items() if "at the end" in quantity]
    return {
        "share with enough": torch.tensor([float(v) for v in enough]),
        "k": float(next(iter(here.values())).split()[0]),
        "at the end": said,
    }, {
        "share with enough": torch.tensor([1.0, 0, 0, 0, 0]),
        "k": 0.5,
        "at the end": ["none: no unit has enough samples"],
    }
