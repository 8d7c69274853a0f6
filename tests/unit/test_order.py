"""Test the sample order: a permutation per epoch, computed at any position, that passes tests of randomness.

The statistics have fixed seeds, so only a change of the function can exceed a bound.
"""

from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from isobatch.scaling import order
from isobatch.scaling.order import MAX_SAMPLES, Indices, indices

POSITIONS = 2**17
# The order is tabulated for the first three and computed for the others. Cycle-walking is longest at 4^k + 1.
SIZES = [4**6 + 1, 50_000, 4**8, 4**8 + 1, 1_281_167, 4**15 + 1, 10**12, 4**31]


def excess(counts: np.ndarray, expected: np.ndarray | float, freedom: int) -> float:
    """Return the chi-square of the counts in standard deviations above its mean, which is about normal if random."""
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def is_permutation(order_of_epoch: Indices, n: int) -> bool:
    return len(order_of_epoch) == n and bool((np.bincount(order_of_epoch, minlength=n) == 1).all())


# ---- a permutation for any n


def test_every_epoch_is_a_permutation_for_every_n_to_4096() -> None:
    assert [n for n in range(1, 4097) if not is_permutation(indices(7, n, 0, n), n)] == []


@pytest.mark.parametrize("bits", range(13, 21))
def test_every_epoch_is_a_permutation_around_powers_of_two(bits: int) -> None:
    for n in range(2**bits - 2, 2**bits + 3):
        assert is_permutation(indices(7, n, 3 * n, 4 * n), n), n


@pytest.mark.parametrize("n", [2**40 + 1, 10**12, 2**62 - 1, 2**62])
def test_indices_of_enormous_datasets_are_unique_and_in_range(n: int) -> None:
    some = indices(7, n, n - POSITIONS, n)
    assert len(np.unique(some)) == POSITIONS
    assert some.min() >= 0
    assert some.max() < n


# ---- independent of the requested ranges, without growing memory


@pytest.mark.parametrize("n", [1, 2, 5, 1437, 50_000, 10**12])
def test_pieces_of_any_size_join_to_the_whole_across_epochs(n: int) -> None:
    draw = np.random.default_rng(n)
    start, stop = 4 * n - min(2 * n, 20_000), 4 * n + min(2 * n, 20_000)
    cuts = [start, *sorted(draw.integers(start, stop, 30).tolist()), stop]
    pieces = [indices(0, n, *cut) for cut in pairwise(cuts)]
    whole = indices(0, n, start, stop)
    assert np.array_equal(np.concatenate(pieces), whole)
    single = draw.integers(start, stop, 30).tolist()
    assert [indices(0, n, p, p + 1).item() for p in single] == [int(whole[p - start]) for p in single]


def test_memory_does_not_grow_with_the_dataset() -> None:
    indices(0, 10**12, 0, 1)
    tracemalloc.start()
    indices(0, 10**12, 10**11, 10**11 + 32)
    small = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    answer = indices(0, 10**12, 10**11, 10**11 + 10**6)
    large = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert small < 50_000
    assert large < answer.nbytes + 2_000_000


@pytest.mark.parametrize(
    ("seed", "n", "start", "expected"),
    [
        (0, 5, 0, [0, 3, 4, 1]),
        (0, 1437, 1435, [142, 1274, 858, 1415]),
        (1, 50_000, 7 * 50_000, [21586, 30374, 15061, 18912]),
        (1, 4**8 + 1, 0, [15488, 54377, 44206, 57445]),
        (2**64 + 1, 10**12, 10**12 - 2, [992963183783, 961381075948, 296894010842, 448936335921]),
        (-3, 2**62, 2**70, [868816790392140749, 241311639721564804, 3223242445875033649, 775158138398024548]),
    ],
)
def test_the_order_never_changes(seed: int, n: int, start: int, expected: list[int]) -> None:
    """A run resumes by its samples seen, so a new version or another machine must not change the order."""
    assert indices(seed, n, start, start + 4).tolist() == expected


def test_callers_may_change_the_returned_array() -> None:
    indices(0, 1437, 0, 32)[:] = 0
    assert is_permutation(indices(0, 1437, 0, 1437), 1437)


def test_an_empty_range_is_empty() -> None:
    assert indices(0, 10, 7, 7).tolist() == []
    assert indices(0, 10, 7, 7).dtype == np.int64


@pytest.mark.parametrize(
    ("n", "start", "stop", "message"),
    [
        (0, 0, 1, "n = 0"),
        (-4, 0, 1, "n = -4"),
        (MAX_SAMPLES + 1, 0, 1, "2\\^62"),
        (10, -1, 3, "\\[-1, 3\\)"),
        (10, 5, 4, "\\[5, 4\\)"),
    ],
)
def test_invalid_ranges_are_refused(n: int, start: int, stop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indices(0, n, start, stop)


# ---- no stride, no blocks: within an epoch


@pytest.mark.parametrize("n", SIZES)
def test_differences_are_those_of_a_random_permutation(n: int) -> None:
    """The difference (mod n) of entries a lag apart is uniform in 256 bins, at lags 1 to 16 and all powers of two.

    A stride shows as a peak. A network over halves of bits would repeat itself at powers of two.
    """
    entries = indices(1, n, 0, min(n, POSITIONS))
    lags = {*range(1, 17), *(2**k for k in range(5, 17) if 2**k <= len(entries) // 2)}
    for lag in lags:
        differences = (entries[lag:] - entries[:-lag]) % n
        counts = np.bincount((differences / n * 256).astype(np.int64), minlength=256)
        assert abs(excess(counts, len(differences) / 256, 255)) < 5, lag


@pytest.mark.parametrize("n", SIZES)
def test_no_serial_correlation_and_no_period(n: int) -> None:
    """Correlations at lags up to half the length stay below 6 / √length, and no frequency has 25 × its share.

    For white noise, the largest of 65,536 correlations is near 4.4 / √length, and the largest share is near
    ln 65,536 = 11. A frequency exceeds 25 with a probability of e^-25.
    """
    entries = indices(2, n, 0, min(n, POSITIONS)).astype(np.float64)
    entries = (entries - entries.mean()) / entries.std()
    length = len(entries)
    power = np.abs(np.fft.rfft(entries)[1:-1]) ** 2 / length
    assert power.max() / power.mean() < 25
    padded = np.abs(np.fft.rfft(entries, 2 * length)) ** 2
    correlations = np.fft.irfft(padded)[1 : length // 2] / length
    assert np.abs(correlations).max() * math.sqrt(length) < 6


@pytest.mark.parametrize("n", SIZES)
def test_positions_and_entries_are_independent(n: int) -> None:
    """Compare 64 equal blocks and the lowest 6 bits of positions with those of entries."""
    length = min(n, POSITIONS)
    entries = indices(3, n, 0, length)
    positions = np.arange(length)
    for rows in (positions * 64 // length, positions % 64):
        for columns in ((entries / n * 64).astype(np.int64), entries % 64):
            table = np.bincount(rows * 64 + columns, minlength=64 * 64).reshape(64, 64)
            expected = np.outer(table.sum(1), table.sum(0)) / length
            assert abs(excess(table, expected, 63 * 63)) < 5


@pytest.mark.parametrize("half_bits", [10, 16, 20, 31])
def test_one_bit_of_the_position_flips_each_bit_of_the_entry_half_of_the_time(half_bits: int) -> None:
    """The strict avalanche criterion holds for each pair of bits."""
    bits = 2 * half_bits
    shuffle = order._shuffle(4, 0, half_bits)
    positions = np.random.default_rng(0).integers(0, 2**bits, 4000)
    for flipped in range(bits):
        change = shuffle(positions) ^ shuffle(positions ^ (1 << flipped))
        share = ((change[:, None] >> np.arange(bits)) & 1).mean(0)
        assert np.abs(share - 0.5).max() * 2 * math.sqrt(len(positions)) < 5.5, flipped


# ---- independent epochs and seeds


def test_all_epochs_of_all_seeds_differ() -> None:
    """With seed + epoch as the key, epoch 1 of seed 0 would equal epoch 0 of seed 1."""
    orders = {tuple(indices(seed, 50, 50 * epoch, 50 * epoch + 50)) for seed in range(-20, 20) for epoch in range(40)}
    assert len(orders) == 40 * 40


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, -1), (2**32, 0)], ids=["epoch", "seed", "both", "high bits"])
def test_neighbouring_epochs_and_seeds_are_independent(step: tuple[int, int]) -> None:
    """Two orders of 500 agree in Poisson(1) places, also when one is shifted, and their ranks don't correlate."""
    n, pairs = 500, 400
    agreements, correlations = [], []
    for pair in range(pairs):
        seed, epoch = pair % 20, 1 + pair // 20
        other_seed, other_epoch = seed + step[0], epoch + step[1]
        one = indices(seed, n, epoch * n, (epoch + 1) * n)
        other = indices(other_seed, n, other_epoch * n, (other_epoch + 1) * n)
        agreements += [int((one == np.roll(other, shift)).sum()) for shift in range(5)]
        correlations.append(np.corrcoef(one, other)[0, 1] * math.sqrt(n - 1))
    counts = np.bincount(np.minimum(agreements, 4), minlength=5)
    poisson = np.array([1, 1, 1 / 2, 1 / 6]) / math.e
    assert excess(counts, len(agreements) * np.append(poisson, 1 - poisson.sum()), 4) < 5
    assert abs(np.mean(correlations)) * math.sqrt(pairs) < 5
    assert abs(np.square(correlations).sum() - pairs) / math.sqrt(2 * pairs) < 5


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_tiny_dataset_are_equally_likely(n: int) -> None:
    """Test the chi-square of 3,000 epochs of one seed, and of the first epoch of 3,000 seeds."""
    places = n ** np.arange(n)
    by_epoch = indices(5, n, 0, 3000 * n).reshape(-1, n) @ places
    by_seed = np.array([indices(seed, n, 0, n) @ places for seed in range(3000)])
    for codes in (by_epoch, by_seed):
        counts = np.unique(codes, return_counts=True)[1]
        assert len(counts) == math.factorial(n)
        assert excess(counts, len(codes) / len(counts), len(counts) - 1) < 5


@pytest.mark.parametrize(("n", "epochs"), [(16, 12_000), (64, 3000), (128, 3000), (256, 3000)])
def test_neighbours_in_a_small_dataset_are_independent(n: int, epochs: int) -> None:
    """Over thousands of epochs each entry is uniform, and so is the XOR of entries whose positions differ in one bit.

    Too few rounds fail here first, since with few bits two positions that share half of their bits stay related.
    """
    orders = indices(6, n, 0, epochs * n).reshape(epochs, n)
    for entry in range(16):
        assert excess(np.bincount(orders[:, entry], minlength=n), epochs / n, n - 1) < 5
    for bit in range(n.bit_length() - 1):
        one = np.flatnonzero(np.arange(n) >> bit & 1 == 0)
        change = orders[:, one] ^ orders[:, one ^ (1 << bit)]
        assert excess(np.bincount(change.ravel(), minlength=n)[1:], change.size / (n - 1), n - 2) < 5, bit
