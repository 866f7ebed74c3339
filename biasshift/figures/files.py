"""A figure as PNG and PDF, both or none; and errors as sentences, for scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.atomic import replacing

if TYPE_CHECKING:
    from biasshift.plots import Figure

CAPTION = {"png": "Description", "pdf": "Subject"}  # what the formats call it
USAGE_ERROR = 2  # exit status


def write_both(name: str, figure: Figure, folder: Path, words: str) -> list[Path]:
    """Writes a figure as PNG and PDF.

    Raises:
        OSError: one of them cannot be written; then the other one is as it was before, too.
    """
    drawn = {
        folder / f"figure_{name}.{kind}": _drawn(figure, kind, f"Figure {name}", words)
        for kind in CAPTION
    }
    folder.mkdir(parents=True, exist_ok=True)
    (png, pdf), contents = drawn, list(drawn.values())
    if png.is_dir():  # before the PDF has taken its place
        raise IsADirectoryError(
            EISDIR, "is a folder: remove it, or choose another one with --out", str(png)
        )
    try:
        with replacing(png) as first, replacing(pdf) as second:
            first.write_bytes(contents[0])
            second.write_bytes(contents[1])
    except OSError as error:
        why = f"Figure {name} cannot be written ({error.strerror}): make room there, or choose another folder with --out"
        raise OSError(error.errno, why, str(folder)) from error
    return [png, pdf]


def _drawn(figure: Figure, kind: str, title: str, words: str) -> bytes:
    content = BytesIO()
    with plots.style():
        figure.savefig(content, format=kind, metadata={"Title": title, CAPTION[kind]: words})
    return content.getvalue()


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Ends a script with one sentence and status 2 where its runs cannot be drawn: `with
    figures.in_a_sentence(): …`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        where = f"'{error.filename}': " if isinstance(error, OSError) and error.filename else ""
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"{Path(sys.argv[0]).name}: {where}{said}".rstrip(".") + ".", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
