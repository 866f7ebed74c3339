"""A cache on disk of arrays that take minutes to compute, named by the hash of their inputs."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from biasshift.atomic import replacing
from biasshift.data.dataset import data_root

Arrays = dict[str, np.ndarray]


def cache_folder(root: str | Path | None = None) -> Path:
    """Returns the folder of computed arrays: `$BIASSHIFT_CACHE`, else `cache/` in the data folder.

    Args:
        root: the folder of the data sets, see `data_root`. The folder need not exist.
    """
    return Path(os.environ.get("BIASSHIFT_CACHE") or data_root(root) / "cache").expanduser()


def content_key(*parts: object) -> str:
    """Returns a SHA-256 of what `parts` hold, in hexadecimal digits.

    Arrays count with dtype, shape and content, everything else with its ``repr``. Two calls agree
    only where all parts agree in this sense, and in their order.

    >>> content_key(np.zeros(3), 0.1) == content_key(np.zeros(3), 0.2)
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).data)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def cached(
    kind: str,
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    compute: Callable[[], Arrays],
    cache: Path,
) -> Arrays:
    """Returns the float64 arrays of `compute`, from the cache where a complete entry exists.

    A damaged entry is computed anew and replaced. Where the cache cannot be written, the arrays are
    computed in every call: the result is the same.

    Args:
        kind: the beginning of the file's name.
        key: of what the arrays are computed from, see `content_key`.
        shapes: of the arrays by name; a file with others is not an entry of this cache.
        compute: called without arguments where there is no complete entry.
        cache: the folder of the entries, see `cache_folder`.
    """
    path = cache / f"{kind}-{key[:32]}.npz"
    arrays = _read(path, shapes)
    if arrays is None:
        arrays = compute()
        _write(path, arrays)
    return arrays


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Arrays | None:
    """The arrays, or none if anything is wrong with the file; zip keeps a checksum of each."""
    max_bytes = sum(8 * int(np.prod(shape)) + 1024 for shape in shapes.values()) + 1024
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
            arrays = {name: entry[name] for name in shapes}
    except Exception:  # which one depends on the byte that is wrong
        return None
    whole = all(
        arrays[name].shape == tuple(shape)
        and arrays[name].dtype == np.float64
        and np.isfinite(arrays[name]).all()
        for name, shape in shapes.items()
    )
    return arrays if whole else None


def _write(path: Path, arrays: Arrays) -> None:
    """The processes of one run compute the same entry at the same time: the last one's stays."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
