"""Standard output and errors that stop nothing: full, closed, of few letters, or read by nobody."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from biasshift.escapes import visible

# For encodings that lack them. All else becomes an escape.
_PLAIN = str.maketrans(
    {
        "→": "->", "±": "+-", "–": "-", "−": "-", "×": "x", "…": "...", "·": "*", "≥": ">=",
        "✓": "+", "✗": "-",
        "≤": "<=", "²": "^2", "ᵀ": "^T", "₀": "0", "Δ": "D", "’": "'", "“": '"', "”": '"',
    }
)  # fmt: skip


class EnduringStream:
    """A text stream whose errors are kept, not raised: training goes on without its output.

    Behind the first error everything that is written is lost, and the file descriptor leads to the
    empty device. Letters that the encoding lacks are written in other ones.

    Args:
        stream: What is written to; all other attributes are its own.
        shown: Called with every text, for what may be written of it.

    Attributes:
        error: What came of writing, if it failed.
    """

    def __init__(self, stream: Any, shown: Callable[[str], str] = str):
        self._stream, self.shown = stream, shown
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text as far as that is possible, and returns its length."""
        if self.error is None:
            with self._kept():
                self._stream.write(_encodable(self.shown(text), self._stream.encoding))
        return len(text)

    def flush(self) -> None:
        """Hands everything to the system, as far as that is possible."""
        if self.error is None:
            with self._kept():
                self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            # What waits in the buffer would be tried again at the end of the program, and fail
            # with a traceback. Streams of tests have no descriptor.
            with suppress(OSError, ValueError):
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, self._stream.fileno())
                os.close(descriptor)


@contextmanager
def enduring_streams() -> Iterator[tuple[EnduringStream, EnduringStream]]:
    """Puts enduring streams in place of ``sys.stdout`` and ``sys.stderr``, and yields the two.

    What goes to a file or a pipe has no sign that a terminal would obey, and errors have at most
    the colors of the parser's messages.
    """
    before = sys.stdout, sys.stderr
    # Without a console there is none.
    output, errors = (EnduringStream(stream or open(os.devnull, "w")) for stream in before)
    if not _is_colored(output):
        output.shown = _lines
    errors.shown = _colored_lines if _is_colored(errors) else _lines
    sys.stdout, sys.stderr = output, errors  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield output, errors
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def _is_colored(stream: EnduringStream) -> bool:
    return stream.isatty() or any(os.environ.get(n) for n in ("FORCE_COLOR", "TTY_COMPATIBLE"))


def _lines(text: str) -> str:
    return visible(text, keep="\n\t")


def _colored_lines(text: str) -> str:
    """Keeps ``ESC [ numbers m``, which changes the color and nothing else."""
    first, *others = text.split("\x1b[")
    parts = [_lines(first)]
    for other in others:
        numbers, letter, rest = other.partition("m")
        is_color = letter and not numbers.strip("0123456789;")
        parts.append(f"\x1b[{numbers}m{_lines(rest)}" if is_color else _lines(f"\x1b[{other}"))
    return "".join(parts)


def _encodable(text: str, encoding: str | None) -> str:
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text
