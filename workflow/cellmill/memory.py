"""Memory of large arrays, kept by the process once it has been used."""

import ctypes

LARGEST = 32 * 1024**2
"""Arrays above it are given back one by one: glibc's own limit."""
KEPT = 1024**3
"""Free memory that is kept."""
HEAP = 128 * 1024**2
"""More than one heap of a thread has: a heap that is empty is kept, too."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed arrays up to `LARGEST` bytes, instead of giving it back after each one.

    To take memory anew, page by page, costs several times what is computed on it. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for parameter, value in ((_TRIM_THRESHOLD, KEPT), (_TOP_PAD, HEAP), (_MMAP_THRESHOLD, LARGEST)):
            libc.mallopt(parameter, value)
