"""Test that any global batch is split completely and evenly on any world size, and that errors name fixes."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isobatch.scaling.geometry import Cut, halves, nearest_even, solve
from tests.support.examples import examples

quick = examples(75)

worlds = st.integers(1, 9) | st.integers(1, 100_000)
granule_counts = st.integers(1, 300) | st.integers(1, 10**7)
sizes = st.integers(1, 12) | st.integers(1, 5000)


@st.composite
def asked(draw: st.DrawFn, worlds: st.SearchStrategy[int] = worlds, ways: str = "g p ga gp pa gpa") -> dict[str, Any]:
    """Draw consistent arguments of ``solve``. ``ways`` has the initials of each combination of given sizes."""
    world, granule = draw(worlds), draw(st.sampled_from([1, 1, 2, 7, 32]))
    global_size = draw(granule_counts) * granule
    per_gpu = draw(sizes) + granule - 1
    passes = draw(st.integers(1, 12))
    given = draw(st.sampled_from(ways.split()))
    wanted: dict[str, Any] = {"world": world, "granule": granule}
    if "g" in given:
        wanted["global_size"] = global_size
    if "p" in given:
        wanted["per_gpu"] = per_gpu
        wanted["bitwise"] = draw(st.booleans())
    if "a" in given:
        wanted["accumulation"] = solve(**wanted).accumulation if given == "gpa" else passes
    return wanted


def place(cut: Cut, j: int) -> tuple[int, int]:
    """Return rank and pass of micro-batch j: j mod world and j div world, or by blocks if there are ``pieces``."""
    if cut.pieces is None:
        return j % cut.world, j // cut.world
    shorter, longer = divmod(cut.pieces, cut.world)
    if j < longer * (shorter + 1):
        return divmod(j, shorter + 1)
    rank, index = divmod(j - longer * (shorter + 1), shorter)
    return longer + rank, index


def ranges(cut: Cut) -> list[tuple[int, int]]:
    """Return the ranges of all micro-batches in order."""
    return [cut.micro(*place(cut, j)) for j in range(cut.pieces or cut.world * cut.accumulation)]


# ---- every cut


@given(asked())
@quick
def test_sizes_sum_to_the_global_batch_and_are_at_most_per_gpu(wanted: dict[str, Any]) -> None:
    cut = solve(**wanted)
    runs = cut.micro_batches
    assert sum(size * count for size, count in runs) == cut.global_size
    assert sum(count for _, count in runs) == cut.world * cut.accumulation
    assert all(count > 0 and 0 <= size <= cut.per_gpu and size % cut.granule == 0 for size, count in runs)
    assert cut.even is (len(runs) == 1)
    if cut.pieces:
        assert cut.pieces == sum(count for size, count in runs if size)
        runs = tuple(run for run in runs if run[0])
    assert all(before[0] - after[0] == cut.granule for before, after in pairwise(runs))


@given(asked(st.integers(1, 40)))
@quick
def test_ranges_are_consecutive_and_tile_the_batch(wanted: dict[str, Any]) -> None:
    cut = solve(**wanted)
    assume(cut.world * cut.accumulation < 2000)
    pieces = cut.pieces or cut.world * cut.accumulation
    lengths = [size for size, count in cut.micro_batches for _ in range(count)][:pieces]
    stops = list(accumulate(lengths))
    assert ranges(cut) == list(zip([0, *stops[:-1]], stops, strict=True))
    assert sorted(j for rank in range(cut.world) for j in cut.block(rank)) == list(range(pieces))
    for rank in range(cut.world):
        passes, block = list(cut.passes(rank)), cut.block(rank)
        assert len(passes) == cut.accumulation
        assert passes[: len(block)] == [ranges(cut)[j] for j in block]
        assert all(start == stop == cut._start(block.stop) for start, stop in passes[len(block) :])
        assert cut.share(rank) == sum(stop - start for start, stop in passes)


@given(asked(), st.data())
@quick
def test_a_single_range_is_right_among_100_000_ranks(wanted: dict[str, Any], data: st.DataObject) -> None:
    cut = solve(**wanted)
    count = cut.pieces or cut.world * cut.accumulation
    j = data.draw(st.integers(0, count - 1))
    start, stop = cut.micro(*place(cut, j))
    assert cut.block(place(cut, j)[0])[place(cut, j)[1]] == j
    assert start == sum(
        size * max(0, min(run, j - before))
        for before, (size, run) in zip([0, cut.micro_batches[0][1]], cut.micro_batches, strict=False)
    )
    following = cut.micro(*place(cut, j + 1))[0] if j + 1 < count else cut.global_size
    assert stop == following


@given(asked(), st.data())
@quick
def test_shares_differ_by_at_most_one_granule(wanted: dict[str, Any], data: st.DataObject) -> None:
    cut = solve(**wanted)
    ranks = sorted(data.draw(st.sets(st.integers(0, cut.world - 1), min_size=1, max_size=20)) | {0, cut.world - 1})
    shares = [cut.share(rank) for rank in ranks]
    assert shares == sorted(shares, reverse=True)
    if cut.pieces is None:
        assert shares[0] - shares[-1] in (0, cut.granule)
    assert shares[0] <= cut.accumulation * cut.micro_batches[0][0]
    assert 0 <= cut.idle < 1
    assert cut.idle == pytest.approx(1 - cut.global_size / (cut.world * max(shares)))


def test_sizes_equal_those_by_hand() -> None:
    cut = Cut(global_size=100, per_gpu=17, world=3, accumulation=2)
    assert ranges(cut) == [(0, 17), (17, 34), (34, 51), (51, 68), (68, 84), (84, 100)]
    cut = Cut(global_size=96, per_gpu=7, world=3, accumulation=5)
    assert cut.micro_batches == ((7, 6), (6, 9))
    assert [cut.share(rank) for rank in range(3)] == [32, 32, 32]
    assert cut.idle == 0
    cut = Cut(global_size=2, per_gpu=1, world=5, accumulation=1)
    assert ranges(cut) == [(0, 1), (1, 2), (2, 2), (2, 2), (2, 2)]
    assert cut.idle == pytest.approx(0.6)
    cut = Cut(global_size=40, per_gpu=16, world=2, accumulation=2, granule=8)
    assert cut.micro_batches == ((16, 1), (8, 3))
    assert [cut.share(rank) for rank in range(2)] == [24, 16]


def test_blocks_equal_those_by_hand() -> None:
    cut = solve(3, global_size=100, per_gpu=16, bitwise=True)
    assert (cut.pieces, cut.accumulation, cut.micro_batches) == (7, 3, ((15, 2), (14, 5), (0, 2)))
    assert [list(cut.block(rank)) for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert list(cut.passes(0)) == [(0, 15), (15, 30), (30, 44)]
    assert list(cut.passes(1)) == [(44, 58), (58, 72), (72, 72)]
    assert [cut.share(rank) for rank in range(3)] == [44, 28, 28]
    assert cut.idle == pytest.approx(1 - 100 / 132)
    cut = solve(4, global_size=40, per_gpu=30, granule=8, bitwise=True)
    assert [list(cut.passes(rank)) for rank in range(4)] == [[(0, 24)], [(24, 40)], [(40, 40)], [(40, 40)]]


@given(asked(ways="gp"), worlds)
@quick
def test_bitwise_cuts_are_the_same_on_any_world(wanted: dict[str, Any], world: int) -> None:
    cut, other = (solve(**{**wanted, "bitwise": True, "world": each}) for each in (wanted["world"], world))
    assert cut.pieces == other.pieces
    assert [run for run in cut.micro_batches if run[0]] == [run for run in other.micro_batches if run[0]]
    assert solve(**{**wanted, "bitwise": False}).accumulation == cut.accumulation


@given(asked(), worlds)
@quick
def test_halves_are_the_same_on_any_world(wanted: dict[str, Any], world: int) -> None:
    cut = solve(**wanted)
    found = halves(cut)
    assert (found is None) is ((cut.pieces or cut.global_size // cut.granule) < 2)
    if found is None:
        return
    first, second = found
    assert first.global_size + second.global_size == cut.global_size
    assert all(half.micro_batches[0][0] <= cut.per_gpu and half.world == cut.world for half in found)
    other = halves(solve(**{**wanted, "world": world, "global_size": cut.global_size, "accumulation": None}))
    assert other is not None
    if cut.pieces:
        assert (first.pieces, second.pieces) == (-(-cut.pieces // 2), cut.pieces // 2)  # as the tree sums them
        filled = [size for half in found for size, count in half.micro_batches for _ in range(count) if size]
        assert filled == [size for size, count in cut.micro_batches for _ in range(count) if size]
    else:
        assert first.global_size - second.global_size in (0, cut.granule)
        assert [half.global_size for half in found] == [half.global_size for half in other]


def test_the_cost_does_not_grow_with_the_ranks() -> None:
    cut = solve(10**12, global_size=10**18 + 1, per_gpu=10**3)  # a loop over ranks or passes would take forever
    assert cut.accumulation == 10**3 + 1
    assert cut.micro(10**12 - 1, 10**3)[1] == 10**18 + 1
    assert cut.share(0) - cut.share(10**12 - 1) in (0, 1)
    assert cut.idle < 1e-3
    cut = solve(10**12, global_size=10**18 + 1, per_gpu=10**3, bitwise=True)
    assert (cut.accumulation, cut.pieces) == (10**3 + 1, 10**15 + 1)
    assert cut.micro(10**12 - 1, 10**3) == (10**18 + 1, 10**18 + 1)
    assert cut.share(0) - cut.share(10**12 - 1) <= 2 * 10**3 + 1


# ---- missing sizes are solved


@given(asked())
@quick
def test_sizes_that_are_not_given_are_solved(wanted: dict[str, Any]) -> None:
    cut = solve(**wanted)
    assert all(getattr(cut, name) == value for name, value in wanted.items() if name != "bitwise")
    granules, most = cut.global_size // cut.granule, cut.per_gpu // cut.granule
    if "global_size" not in wanted:
        assert granules == most * cut.world * cut.accumulation
        assert wanted.get("accumulation", 1) == cut.accumulation
    elif "per_gpu" not in wanted:
        assert wanted.get("accumulation", 1) == cut.accumulation
        assert cut.per_gpu == cut.micro_batches[0][0]
    else:  # no pass more than needed
        assert most * cut.world * (cut.accumulation - 1) < granules <= most * cut.world * cut.accumulation


@pytest.mark.parametrize(
    ("wanted", "solved"),
    [
        ({"world": 8, "global_size": 1024}, (1024, 128, 1)),
        ({"world": 3, "global_size": 1000}, (1000, 334, 1)),
        ({"world": 3, "global_size": 1000, "accumulation": 4}, (1000, 84, 4)),
        ({"world": 3, "global_size": 1000, "per_gpu": 100}, (1000, 100, 4)),
        ({"world": 3, "global_size": 10, "per_gpu": 100}, (10, 100, 1)),
        ({"world": 3, "per_gpu": 100}, (300, 100, 1)),
        ({"world": 3, "per_gpu": 100, "accumulation": 2}, (600, 100, 2)),
        ({"world": 3, "global_size": 1000, "per_gpu": 100, "accumulation": 4}, (1000, 100, 4)),
        ({"world": 3, "global_size": 96, "per_gpu": 20, "granule": 8}, (96, 20, 2)),
        ({"world": 3, "per_gpu": 20, "granule": 8}, (48, 20, 1)),
        ({"world": 5, "global_size": 96, "granule": 8}, (96, 24, 1)),
    ],
)
def test_solved_sizes_equal_those_by_hand(wanted: dict[str, Any], solved: tuple[int, int, int]) -> None:
    cut = solve(**wanted)
    assert (cut.global_size, cut.per_gpu, cut.accumulation) == solved


# ---- errors, whose alternatives have to work


def refusal(**wanted: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the callers look at the message)
        solve(**wanted)
    return str(error.value)


def numbers(text: str, after: str) -> list[int]:
    """Return the numbers that follow some words, as in ``1 or 2``."""
    return [int(number) for number in re.findall(r"\d+", text.split(after)[1].split(";")[0])]


@pytest.mark.parametrize("name", ["global_size", "per_gpu", "accumulation"])
@pytest.mark.parametrize("size", [0, -3])
def test_sizes_below_one_are_refused(name: str, size: int) -> None:
    message = refusal(**{"world": 2, "global_size": 8, name: size})
    assert message == f"batch.{name}={size}: has to be at least 1"


def test_no_ranks_and_no_sizes_are_refused() -> None:
    assert "world size=0" in refusal(world=0, global_size=8)
    assert "batch.global_size and batch.per_gpu" in refusal(world=2, accumulation=3)
    assert "give batch.per_gpu" in refusal(world=2, global_size=64, bitwise=True)


@given(asked(ways="gp"), st.integers(1, 40))
@quick
def test_a_contradiction_names_working_sizes(wanted: dict[str, Any], other: int) -> None:
    assume(other != solve(**wanted).accumulation)
    wanted["accumulation"] = other
    message = refusal(**wanted)
    for name in ("global_size", "per_gpu", "accumulation"):
        assert f"batch.{name}={wanted[name]}" in message
        if name != "per_gpu" or not wanted["bitwise"]:
            solve(**{**wanted, name: None})  # two of the three
    alternatives = re.findall(r"batch\.(\w+)=(\d+)", message.split("change one:")[1])
    assert {"accumulation", "global_size"} <= {name for name, _ in alternatives}
    for name, size in alternatives:
        solve(**{**wanted, name: int(size)})


def test_a_contradiction_names_the_sizes_found_by_hand() -> None:
    message = refusal(world=2, global_size=100, per_gpu=8, accumulation=4)
    assert "on 2 ranks the first two need 7 passes" in message
    assert message.endswith("batch.accumulation=7 or batch.per_gpu=13 or batch.global_size=64")
    message = refusal(world=2, global_size=100, per_gpu=8, accumulation=4, even=True)
    assert message.endswith("change one: batch.global_size=64"), "the other alternatives aren't even"


@given(asked())
@quick
def test_even_refuses_exactly_uneven_cuts_and_names_even_ones(wanted: dict[str, Any]) -> None:
    cut = solve(**wanted)
    if cut.even:
        assert solve(**wanted, even=True) == cut
        return
    message = refusal(**wanted, even=True)
    assert f"batch.global_size={cut.global_size} on {cut.world:,} rank" in message
    near = numbers(message, f"even global batches on {'1 rank' if cut.world == 1 else f'{cut.world:,} ranks'}:")
    assert near[-1] > cut.global_size
    for size in near:
        assert solve(**{**wanted, "global_size": size}, even=True).global_size == size
    for world in numbers(message, f"world sizes for {cut.global_size}:"):
        assert solve(**{**wanted, "world": world}, even=True).world == world


@given(
    st.integers(1, 12),
    st.integers(1, 200),
    st.none() | st.integers(1, 30),
    st.none() | st.integers(1, 6),
    st.sampled_from([1, 4]),
    st.booleans(),
)
@quick
def test_the_named_even_sizes_are_the_nearest(
    world: int, granules: int, per_gpu: int | None, passes: int | None, granule: int, bitwise: bool
) -> None:
    def dealt(world: int, granules: int) -> Cut | None:
        try:
            return solve(world, global_size=granules * granule, **others)
        except ValueError:
            return None

    def even(world: int, granules: int) -> bool:
        cut = dealt(world, granules)
        return cut is not None and cut.even

    most = per_gpu and per_gpu * granule
    others: dict[str, Any] = {"per_gpu": most, "accumulation": passes, "granule": granule, "bitwise": bitwise}
    cut = dealt(world, granules)
    assume(cut is not None and not cut.even)
    assert cut is not None
    below = [size * granule for size in range(granules - 1, 0, -1) if even(world, size)][:1]
    above = next(size for size in range(granules + 1, 10**5) if even(world, size)) * granule
    assert nearest_even(cut, most, passes) == [*below, above]
    message = refusal(world=world, global_size=cut.global_size, **others, even=True)
    fewer = [other for other in range(world - 1, 0, -1) if even(other, granules)][:1]
    more = [other for other in range(world + 1, granules + 1) if even(other, granules)][:1]
    assert numbers(message, f"world sizes for {cut.global_size}:") == [*fewer, *more]


def test_nearest_even_sizes_equal_those_by_hand() -> None:
    assert "nearest even global batches on 3 ranks: 99 or 102; nearest world sizes for 100: 2 or 4" in refusal(
        world=3, global_size=100, even=True
    )
    assert "on 300,000 ranks: 300000 or 600000;" in refusal(world=300_000, global_size=300_001, even=True)
    assert "on 4 ranks: 4;" in refusal(world=4, global_size=3, even=True)


@given(st.integers(1, 1000), st.integers(2, 64))
@quick
def test_a_global_batch_that_splits_a_granule_is_refused_with_the_nearest(size: int, granule: int) -> None:
    assume(size % granule)
    near = numbers(refusal(world=3, global_size=size, granule=granule), "nearest:")
    assert near == [whole for whole in (size - size % granule, size - size % granule + granule) if whole]
    for whole in near:
        solve(3, global_size=whole, granule=granule)


def test_a_per_gpu_below_the_granule_is_refused() -> None:
    message = refusal(world=3, global_size=64, per_gpu=15, granule=16)
    assert "batch.per_gpu=15" in message
    assert message.endswith("use 16")
    solve(3, global_size=64, per_gpu=16, granule=16)
