"""A reader of the pickles that data sets come in, which does not execute what a file asks for.

Unpickling calls whatever the file names. Here the file may name three things, none of which is what
it seems: stand-ins that keep the numbers of an array of bytes. Not even numpy's own functions are
called, since their arguments would be the file's. Before that, `_inspect` refuses instructions that
no data set needs, so that each of the two checks stands without the other.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from biasshift.data.ordinary_files import read_ordinary

MAX_BYTES = 256 * 2**20  # CIFAR-100's training file, the largest, has 155 MB
# Containers, numbers, strings, memo, and the three calls that rebuild an array. The originals were
# written by Python 2.
PLAIN = set(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)
LIMITED = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
# An array needs ten of the limited; a tuple in a tuple, a million deep, would overflow the stack
# when it is hashed.
MAX_LIMITED = 100
# Of CIFAR-100's 50,000 images, with names and two labels, there are a fifth. Each may make an
# object of some bytes.
MAX_INSTRUCTIONS = 1_500_000


class Refused(Exception):
    """The file asks for what no data set needs."""


class _Array:
    """Stands in for an array: the state that the file gives it becomes `values`."""

    values: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(), bool() | int() as fortran, bytes(content)):
                sizes = [size for size in shape if isinstance(size, int) and size >= 0]
                if len(sizes) != len(shape) or math.prod(sizes) != len(content):
                    raise Refused(
                        f"an array of shape {shape!r:.80} cannot have {len(content)} bytes"
                    )
                self.values = np.frombuffer(content, np.uint8).reshape(
                    sizes, order="F" if fortran else "C"
                )
            case _:
                raise Refused("it holds an array whose content is not plain bytes")


class _Dtype:
    """Stands in for the type of an array's numbers, which has to be the byte."""

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: bytes have none."""


class _Call:
    """Stands in for a function. It has no attributes that a file could change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise Refused("it tries to change a function")


class _Reconstruct(_Call):
    __slots__ = ()

    def __call__(self, *args: object) -> _Array:
        return _Array()


class _MakeDtype(_Call):
    __slots__ = ()

    def __call__(self, name: object, *args: object) -> _Dtype:
        if name not in (b"u1", "u1"):
            raise Refused(f"it holds an array of {name!r:.40} where images have bytes")
        return _Dtype()


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Call(),
    ("numpy", "dtype"): _MakeDtype(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in STAND_INS:
            raise Refused(
                f"it names {f'{module_name}.{global_name}'!r:.80}, which no data set needs and "
                "which is not called"
            )
        return STAND_INS[module_name, global_name]


def read_pickle(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the dictionary that a file holds: numbers, strings, lists, and arrays of bytes.

    Keys are strings. Other strings are bytes where Python 2 wrote them. Arrays are uint8.

    Args:
        path: an ordinary file.
        max_bytes: a larger file is not read.

    Raises:
        RuntimeError: the file cannot be read, is too large, damaged, or holds anything else.
            Nothing in it is executed.
    """
    remedy = (
        "It is damaged or not what its name says: delete it and run again with a network, or copy "
        "it anew"
    )
    try:
        if not path.is_file():  # a pipe would be waited for
            raise RuntimeError(f"'{path}' is not a file.")
        if (size := path.stat().st_size) > max_bytes:
            raise RuntimeError(
                f"'{path}' must have at most {max_bytes} bytes, got {size}. {remedy}."
            )
        content = read_ordinary(path, max_bytes)
    except OSError as error:
        raise RuntimeError(f"'{path}' cannot be read ({error.strerror}). {remedy}.") from error
    try:
        _inspect(content)
        entries = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(entries, dict):
            raise Refused("it does not hold a dictionary")
        return {
            _text(key): value.values if isinstance(value, _Array) else value
            for key, value in entries.items()
        }
    except Refused as refusal:
        raise RuntimeError(f"'{path}' is refused, since {refusal}. {remedy}.") from refusal
    except Exception as error:  # which one depends on the byte that is wrong
        raise RuntimeError(f"'{path}' is not a complete pickle. {remedy}.") from error


def _inspect(content: bytes) -> None:
    """Checks the instructions before any is carried out: their kinds, and what would take memory or
    depth without bound.
    """
    count = limited = 0
    for opcode, argument, _ in pickletools.genops(content):
        count += 1
        limited += opcode.name in LIMITED
        if opcode.name not in PLAIN | LIMITED or limited > MAX_LIMITED:
            raise Refused(
                f"it contains the instruction {opcode.name}, which no data set "
                f"needs{' so often' * (limited > MAX_LIMITED)}"
            )
        if count > MAX_INSTRUCTIONS:
            raise Refused("it has more parts than any data set")
        # A place in the memo takes memory for all places before it.
        if opcode.name.endswith("PUT") and int(argument or 0) > count:
            raise Refused("it counts its parts as no program does")


def _text(key: object) -> str:
    if not isinstance(key, str | bytes):
        raise Refused(f"it holds the key {key!r:.40} where names are expected")
    return key if isinstance(key, str) else key.decode("latin1")
