"""The activation functions' names: how they are spelled, and what figures and tables call them.

A name is one of `NAMES`; ``elu:α`` or ``lrelu:slope`` with a number; or an import path
``package.module:Class`` of any other module. Import paths are read as text, and not followed:
those that read run folders need no PyTorch. `biasshift.activations` has the functions.
"""

import difflib
import math
import re
import zlib
from collections.abc import Iterable

LABELS = {
    "elu": "ELU",
    "relu": "ReLU",
    "lrelu": "LReLU",
    "srelu": "SReLU",
    "prelu": "PReLU",
    "selu": "SELU",
    "gelu": "GELU",
    "silu": "SiLU",
    "mish": "Mish",
    "softplus": "Softplus",
    "tanh": "tanh",
}
NAMES = tuple(LABELS)
LONGEST = 100  # letters of an import path: it becomes part of the name of a folder
LONGEST_LABEL = 40
_NUMBER = re.compile(r"(?:\d{1,9}\.?\d{0,17}|\.\d{1,17})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


# -- spelling ----------------------------------------------------------------------------------


def is_import_path(name: object) -> bool:
    """Tells whether a name has the form ``package.module:Class``, without importing anything.

    >>> is_import_path("torch.nn:Hardswish"), is_import_path("elu:0.5"), is_import_path("../a:B")
    (True, False, False)
    """
    return isinstance(name, str) and len(name) <= LONGEST and bool(_IMPORT_PATH.fullmatch(name))


def canonical(name: object, called: str = "'activation'") -> str:
    """Returns the one spelling of an activation function's name, in which runs record it.

    Args:
        name: one of `NAMES`, ``elu:α``, ``lrelu:slope``, or an import path.
        called: what an error calls it.

    Raises:
        ValueError: an unknown name, an α that is not above 0, or a slope that is not between 0
            and 1. It suggests the name that is most alike.

    >>> canonical("elu:0.50"), canonical("elu:1"), canonical("lrelu:1e-2")
    ('elu:0.5', 'elu', 'lrelu:0.01')
    >>> canonical("elu(2)")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: 'activation' must be one of elu, ..., got 'elu(2)'. It is spelled elu:2.
    """
    if isinstance(name, str) and (name in NAMES or is_import_path(name)):
        return name
    kind, value = with_number(name)
    if kind == "elu" and not 0 < value < math.inf:
        raise _refused(called, f"must have an α above 0, such as elu:0.5, got {shown(name)}.")
    if kind == "lrelu" and not 0 < value < 1:
        raise _refused(
            called, f"must have a slope between 0 and 1, such as lrelu:0.01, got {shown(name)}."
        )
    if not kind:
        raise _refused(
            called,
            f"must be one of {', '.join(NAMES)}, or package.module:Class, got "
            f"{shown(name)}.{_suggestion(name)}",
        )
    if value == {"elu": 1.0, "lrelu": 0.1}[kind]:
        return kind
    return f"{kind}:{value!r}".removesuffix(".0")


def _refused(called: str, reason: str) -> ValueError:
    return ValueError(f"{called} {reason}")


def with_number(name: object) -> tuple[str, float]:
    """Returns the parts of ``elu:α`` and ``lrelu:slope``; NaN is no number, and "" another name."""
    kind, colon, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or kind not in ("elu", "lrelu"):
        return "", math.nan
    return kind, float(number) if _NUMBER.fullmatch(number) else math.nan


def _suggestion(name: object) -> str:
    if not isinstance(name, str) or len(name) > LONGEST_LABEL:
        return ""
    if re.fullmatch(r"l?relu\(.*\)|elu\(.*\)", name):
        return f" It is spelled {name[:-1].replace('(', ':')}."
    alike = difflib.get_close_matches(name.lower(), NAMES, 1)
    return f" Did you mean {alike[0]}?" if alike else ""


# -- what people read --------------------------------------------------------------------------


def display_name(name: object) -> str:
    """Returns what figures, tables and sentences call an activation function.

    A name that is not known stays as it is, as long as it is short and printable. Otherwise it is
    cut and gets a checksum: two names never share a label.

    >>> display_name("lrelu"), display_name("elu:0.5"), display_name("torch.nn:Hardswish")
    ('LReLU', 'ELU (α = 0.5)', 'torch.nn:Hardswish')
    """
    text = str(name)
    if text in LABELS:
        return LABELS[text]
    kind, value = with_number(text)
    if value == value:
        return f"{LABELS[kind]} ({'α' if kind == 'elu' else 'slope'} = {value:g})"
    plain = printable(text)
    if plain == text and len(text) <= LONGEST_LABEL:
        return text
    # From the end: there is the class.
    start, end = (plain[:8], plain[-16:]) if len(plain) > LONGEST_LABEL else (plain, "")
    return f"{start}…{end} #{zlib.crc32(text.encode(errors='replace')):08x}"


def ordered(names: Iterable[object]) -> list[str]:
    """Returns the known names among some, in one order everywhere: the paper's four first.

    >>> ordered(["gelu", "relu", "mine:Own", "elu"])
    ['elu', 'relu', 'gelu']
    """
    present = set(map(str, names))
    first = ("elu", "srelu", "lrelu", "relu")  # that of the paper's figures
    return [name for name in dict.fromkeys((*first, *NAMES)) if name in present]


def folder_part(name: str) -> str:
    """Returns a name without its colon, for the name of a run folder.

    >>> folder_part("elu"), folder_part("elu:0.5"), folder_part("torch.nn:Hardswish")
    ('elu', 'elu0.5', 'torch.nn.Hardswish')
    """
    return name.replace(":", "." if is_import_path(name) else "")


def printable(text: str) -> str:
    """Returns a text in one line, without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def shown(name: object) -> str:
    """Returns a name in quotes for an error message, cut where it is long."""
    text = printable(str(name)[: 2 * LONGEST])
    return f"'{text}'" if len(text) <= LONGEST_LABEL else f"'{text[:LONGEST_LABEL]}…'"
