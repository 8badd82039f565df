"""Counter-based random numbers: every draw is a pure function of integer keys.

A masked gene, a sampled gene or a broken tie depends only on (seed, step, cell, gene), never on a generator's state.
So a cell's input is the same whatever batch, chunk, rank or worker it arrives in, and a resumed run needs no random
state for its data. The mixing function is splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), chained over
the keys.
"""

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*keys) -> np.ndarray:
    """Hash integer keys, broadcast against each other, to uint64.

    Parameters
    ----------
    *keys
        Integers, integer arrays that broadcast together, or strings (the name of the draw's purpose).
    """
    state = np.zeros(1, np.uint64)  # one element, so that uint64 wraps silently as arrays do
    for key in keys:
        if isinstance(key, str):
            key = zlib.crc32(key.encode())
        key = np.atleast_1d(np.asarray(key))
        state = _mix((state + _GOLDEN) ^ _mix(key.astype(np.int64).view(np.uint64) + _GOLDEN))
    return state


def uniform(*keys) -> np.ndarray:
    """Uniform floats in [0, 1) with 53 random bits, one for each broadcast tuple of `keys` (see `hash64`)."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
