"""Counter-based random numbers: every draw is a pure function of integer keys.

A masked gene, a sampled gene or a broken tie depends only on (seed, step, cell, gene), never on a generator's state.
So a cell's input is the same whatever batch, chunk, rank or worker it arrives in, and a resumed run needs no random
state for its data. The mixing function is splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), chained over
the keys.
"""

import zlib
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """In place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash64(*keys) -> np.ndarray:
    """Hash integer keys, broadcast against each other, to uint64.

    Parameters
    ----------
    *keys
        Integers, integer arrays that broadcast together, or strings (the name of the draw's purpose).
    """
    plain = 0
    while plain < len(keys) and isinstance(keys[plain], int | str):
        plain += 1
    state = np.array([_hash_plain(keys[:plain])], np.uint64)  # one element, so that uint64 wraps silently as arrays do
    for key in keys[plain:]:
        if isinstance(key, str):
            key = zlib.crc32(key.encode())
        state = next_key(state, np.atleast_1d(np.asarray(key)))
    return state


@lru_cache(maxsize=1024)
def _hash_plain(keys: tuple[int | str, ...]) -> int:
    """`hash64` of plain numbers and strings, which come in front and again and again: arrays of one are slow."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        if isinstance(key, str):
            key = zlib.crc32(key.encode())
        state = next_key(state, np.array([key]))
    return int(state[0])


def next_key(state: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The hash of (keys..., `key`) from `state`, the hash of the keys before it; integers that broadcast together."""
    mixed = key.astype(np.int64).view(np.uint64)
    mixed += _GOLDEN
    return next_mixed(state, _mix(mixed))


def next_mixed(state: np.ndarray, mixed: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`next_key` of keys that are mixed already (see `mixed_keys`), written to `out` if given, which may be `state`."""
    out = np.add(state, _GOLDEN, out=out)
    return _mix(np.bitwise_xor(out, mixed, out=out if out.shape == mixed.shape else None))


@lru_cache(maxsize=4)
def mixed_keys(n: int) -> np.ndarray:
    """uint64 [n], the keys 0, 1, 2, ... mixed, for `next_mixed`; not to be written to."""
    return _mix(np.arange(n, dtype=np.uint64) + _GOLDEN)


def uniform(*keys) -> np.ndarray:
    """Uniform floats in [0, 1) with 53 random bits, one for each broadcast tuple of `keys` (see `hash64`)."""
    return unit(hash64(*keys))


def unit(hashes: np.ndarray) -> np.ndarray:
    """Hashes as floats in [0, 1), from their upper 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(hashes: np.ndarray, share: float) -> np.ndarray:
    """Where ``unit(hashes) < share``, for a share of at most 1: with that probability, from integers alone."""
    limit = int(np.ceil(share * 2.0**53))
    return np.ones(hashes.shape, bool) if limit >> 53 else hashes < np.uint64(limit << 11)
