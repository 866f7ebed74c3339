"""Memory that a process has freed stays its own: training on a CPU asks for the same every step."""

import ctypes
import sys

# Of malloc.h. Blocks as large as feature maps come from the system anew at every request otherwise,
# page by page.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Returns whether the allocator of this process now keeps what is freed, for its next request.

    The process then never shrinks. Where the C library is not glibc, nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
