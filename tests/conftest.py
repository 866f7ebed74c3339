"""What every test gets: fixed randomness, skips with a reason, and types checked where asked."""

import os
import signal
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("MPLBACKEND", "Agg")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Side by side, more threads than cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background makes them ignore Ctrl-C, which the programs
    # that they start would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("BIASSHIFT_CHECK_TYPES"):
    # Before anything imports biasshift: each call checks the types and shapes of its arguments. The
    # tests take twice as long then, so `.ci/run` asks for it once.
    install_import_hook("biasshift", "beartype.beartype")

# The same examples in every run. No deadline: the first call of a PyTorch operation takes seconds.
settings.register_profile("biasshift", deadline=None, derandomize=True)
settings.load_profile("biasshift")

DATA_ROOT = Path(os.environ.get("BIASSHIFT_DATA") or "data")
MNIST_FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def pytest_report_header() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision")]
    return f"versions: {', '.join(versions)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_data = pytest.mark.skip(
        reason=f"no MNIST/raw below '{DATA_ROOT}'; name the folder with $BIASSHIFT_DATA"
    )
    no_gpu = pytest.mark.skip(reason="no CUDA GPU here")
    has_data = all((DATA_ROOT / "MNIST" / "raw" / name).exists() for name in MNIST_FILES)
    for item in items:
        if item.get_closest_marker("data") and not has_data:
            item.add_marker(no_data)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def data_root() -> Path:
    """The folder of the real data sets, for tests marked `data`."""
    return DATA_ROOT


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(generator):
    """`randn(*shape)`: standard normal numbers in float64, whatever the default dtype."""
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
