"""The sample order: a pseudo-random permutation of the dataset for each epoch, computed without storing it.

A balanced Feistel network permutes the smallest range(4^k) that covers the dataset, and cycle-walking (permute again
while the result is outside) restricts it to range(n). The order needs no memory that grows with n, any position is
computed directly, and the whole data state of a run is one number: the samples seen.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle-walking); Appleby's MurmurHash3 (mixing).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

MAX_SAMPLES = 2**62  # largest dataset whose permuted range fits an int64

# A few thousand epochs distinguish six rounds from chance for 16 to 64 samples, and four rounds for 256, but not eight.
_ROUNDS = 8
# For 2^4 elements eight rounds aren't enough, and it shows that every Feistel network is an even permutation.
_LEAST_HALF_BITS = 3
# Up to 2^16 elements the permutation is tabulated once per epoch (half a megabyte), so small requests are look-ups.
_TABLE_HALF_BITS = 8
# Elements per evaluation: enough to amortise the numpy calls, few enough for a core's cache.
_BLOCK = 1 << 14


def indices(seed: int, n: int, start: int, stop: int) -> Indices:
    """Return the dataset indices at the run's positions [start, stop).

    Position p is entry p mod n of epoch p div n. Every epoch has its own permutation of range(n).

    Args:
        seed: any integer.
        n: number of samples in the dataset.
        start, stop: positions in samples from the start of the run; the range may span epochs.

    Raises:
        ValueError: ``n`` is below 1 or above 2^62, ``start`` is negative, or ``stop`` is before ``start``.

    >>> indices(seed=0, n=5, start=3, stop=12).tolist()
    [1, 2, 0, 1, 4, 2, 3, 2, 4]
    """
    seed, n, start, stop = map(operator.index, (seed, n, start, stop))
    if not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"the sample order needs between 1 and 2^62 samples, not n = {n}")
    if not 0 <= start <= stop:
        raise ValueError(f"positions [{start}, {stop}) aren't a range; start has to be 0 or more, stop at least start")
    half_bits = max(_LEAST_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    order = np.empty(stop - start, np.int64)
    done = 0
    while done < len(order):
        epoch, entry = divmod(start + done, n)
        block = order[done : done + min(_BLOCK, n - entry)]
        shuffle = _shuffle(seed, epoch, half_bits)
        block[:] = shuffle(np.arange(entry, entry + len(block)))
        outside = np.flatnonzero(block >= n)
        while len(outside):
            again = shuffle(block[outside])
            block[outside] = again
            outside = outside[again >= n]
        done += len(block)
    return order


@lru_cache(maxsize=4)
def _shuffle(seed: int, epoch: int, half_bits: int) -> Callable[[Indices], Indices]:
    """Return the permutation of range(4^half_bits) for this seed and epoch."""
    # A hash: with seed + epoch, epoch 1 of seed 0 would equal epoch 0 of seed 1.
    digest = blake2b(f"sample order {seed} {epoch}".encode(), digest_size=4 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u4").tolist()
    feistel = partial(_feistel, half_bits, keys)
    return feistel(np.arange(4**half_bits)).take if half_bits <= _TABLE_HALF_BITS else feistel


def _feistel(half_bits: int, keys: list[int], values: Indices) -> Indices:
    """Permute values of range(4^half_bits): each round XORs a keyed hash of one half of the bits into the other."""
    left = (values >> half_bits).astype(np.uint32)
    right = (values & ((1 << half_bits) - 1)).astype(np.uint32)
    mixed, shifted = np.empty_like(left), np.empty_like(left)
    for key in keys:
        # murmur's finaliser, except that its last shift keeps the product's high bits, which are mixed best
        np.bitwise_xor(right, key, out=mixed)
        mixed ^= np.right_shift(mixed, 16, out=shifted)
        mixed *= 0x85EBCA6B
        mixed ^= np.right_shift(mixed, 13, out=shifted)
        mixed *= 0xC2B2AE35
        mixed >>= 32 - half_bits
        left ^= mixed
        left, right = right, left
    return (left.astype(np.int64) << half_bits) | right
