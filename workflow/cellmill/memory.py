"""Memory of large arrays, kept by the process once it has been used."""

import numpy as np

LARGEST = 31 * 1024**2
"""glibc's limit is 32 MB."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed arrays up to `LARGEST` bytes, instead of giving it back after each one.

    It learns so from an array of that size that is freed. To take memory anew, page by page, costs several times what
    is computed on it. Other C libraries are none the worse.
    """
    np.empty(LARGEST, np.uint8)
