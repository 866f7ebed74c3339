"""Arrays that take minutes to compute, kept in a folder under the hash of what they were computed
from.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from biasshift.data.dataset import data_root

Arrays = dict[str, np.ndarray]


def cache_folder(root: str | Path | None = None) -> Path:
    """Where computed arrays are kept: `$BIASSHIFT_CACHE`, else `cache/` below the folder of the
    data sets, see `data_root`.
    """
    return Path(os.environ.get("BIASSHIFT_CACHE") or data_root(root) / "cache").expanduser()


def content_key(*parts: object) -> str:
    """A name for what `parts` hold: arrays by dtype, shape and content, all else by its text.

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
    """The float64 arrays that `compute` returns, from the cache where they are there and whole.

    A damaged file is computed anew and replaced. A cache that cannot be written is done without:
    the result is the same.

    Args:
        kind: the beginning of the file's name.
        key: of what the arrays are computed from, see `content_key`.
        shapes: of the arrays by name; a file with others is no such cache.
    """
    path = cache / f"{kind}-{key[:32]}.npz"
    found = _read(path, shapes)
    if found is None:
        found = compute()
        _write(path, found)
    return found


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Arrays | None:
    """The arrays, or none if anything is wrong with the file; the zip format keeps a checksum of
    each.
    """
    most = sum(8 * int(np.prod(shape)) + 1024 for shape in shapes.values()) + 1024
    try:
        if not path.is_file() or path.stat().st_size > most:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in shapes}
    except Exception:  # which one depends on the byte that is wrong
        return None
    right = all(
        found[name].shape == tuple(shape) and found[name].dtype == np.float64
        for name, shape in shapes.items()
    )
    return found if right and all(np.isfinite(array).all() for array in found.values()) else None


def _write(path: Path, arrays: Arrays) -> None:
    """Under another name first: whoever reads meanwhile finds a whole file or none."""
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        part.replace(path)
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
