"""What an error of the program becomes: one line."""

import os

from biasshift.escapes import visible

ROOM = (
    "All files that were there are still good. Make room and give the same command again, with "
    "--resume where it trains."
)


def error_message(error: BaseException) -> str:
    """Returns what went wrong in one line; of the system's errors, with the file it is about.

    >>> error_message(FileNotFoundError(2, "No such file or directory", "runs"))
    "'runs': No such file or directory."
    """
    if isinstance(error, OSError) and error.filename is not None:
        from biasshift.atomic import NO_ROOM  # brings sockets and hashes

        room = f" {ROOM}" * (error.errno in NO_ROOM)
        return visible(f"'{os.fsdecode(error.filename)}': {error.strerror}.{room}")
    if isinstance(error, MemoryError):
        return f"Memory is too small. {visible(str(error))}".strip()
    return visible(str(error))
