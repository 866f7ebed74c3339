r"""Text from outside, shown so that it does nothing to a terminal and hides nothing from a reader.

Names of runs, files, layers and options may hold anything: sequences that move the cursor, set the
title or fill the clipboard, marks that turn the order of the letters around, line breaks that make
one name look like two lines.
"""

import unicodedata


def visible(text: str, keep: str = "") -> str:
    r"""Returns the text with an escape in place of every sign that is not seen.

    Those are control characters, marks of direction, and all else that Unicode does not print, such
    as the bytes of a file name that is not UTF-8. Spaces of any width stay.

    Args:
        text: of unknown origin.
        keep: signs that stay nevertheless, such as the line breaks of a text in several lines.

    >>> visible("two\nlines \x1b[31m")
    'two\\nlines \\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign in keep or _is_seen(sign) else _escape(sign) for sign in text)


def storable(text: str) -> str:
    r"""Returns the text as a file in UTF-8 can hold it: names of files may have other bytes.

    >>> storable("elu-\udcff")
    'elu-\\udcff'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_seen(sign: str) -> bool:
    return sign.isprintable() or unicodedata.category(sign) == "Zs"


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
