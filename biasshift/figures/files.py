"""A figure as PNG and PDF, both or none; and errors as sentences, for scripts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from io import BytesIO
from pathlib import Path

from biasshift import plots
from biasshift.atomic import replacing
from biasshift.escapes import visible

CAPTION = {"png": "Description", "pdf": "Subject"}  # what the formats call it
USAGE_ERROR = 2  # exit status


def write_both(name: str, figure: plots.Figure, folder: Path, caption: str) -> list[Path]:
    """Writes a figure as PNG and PDF, with its caption in the metadata; returns the two paths.

    The folder is made if it does not exist. If one of the files cannot be written, the other one
    is as it was before, too.

    Raises:
        OSError: one of them cannot be written; the message says where, why and what to do.
    """
    contents = {kind: BytesIO() for kind in CAPTION}
    for kind, content in contents.items():
        metadata = {"Title": f"Figure {name}", CAPTION[kind]: caption}
        with plots.style():
            figure.savefig(content, format=kind, metadata=metadata)
    png, pdf = (folder / f"figure_{name}.{kind}" for kind in contents)
    folder.mkdir(parents=True, exist_ok=True)
    if png.is_dir():  # found out before the PDF has taken its place
        raise IsADirectoryError(
            EISDIR, "Is a folder. Remove it, or choose another one with --out", str(png)
        )
    try:
        with replacing(png) as first, replacing(pdf) as second:
            first.write_bytes(contents["png"].getvalue())
            second.write_bytes(contents["pdf"].getvalue())
    except OSError as error:
        message = (
            f"Figure {name} cannot be written ({error.strerror}). Make room there, or choose "
            "another folder with --out"
        )
        raise OSError(error.errno, message, str(folder)) from error
    return [png, pdf]


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Ends a script with a message and status 2 where its runs cannot be drawn.

    To be used as `with figures.in_a_sentence(): …`. The message goes to the error output in one
    line, with the name of the script in front; there is no traceback.

    Raises:
        SystemExit: in place of a ValueError or an OSError of the block.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        where = f"'{error.filename}': " if isinstance(error, OSError) and error.filename else ""
        message = error.strerror if isinstance(error, OSError) and error.strerror else error
        sentence = f"{Path(sys.argv[0]).name}: {where}{message}".rstrip(".") + "."
        print(visible(sentence), file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
