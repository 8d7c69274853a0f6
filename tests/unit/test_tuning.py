"""Test the recommendation of a batch and the model of a step's time that it rests on."""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import solve
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.tuning import picture_of
from isobatch.scaling.tuning.recommendation import Prediction, candidates, moving, recommend
from isobatch.scaling.tuning.results import Results
from isobatch.scaling.tuning.speed import Speed, Timed, known_speed, sizes_to_time, unknown, without_slow_rounds
from isobatch.scaling.tuning.witnesses import Witness, agreement, law_compared, over_run, unknowns

# A step takes 4 ms once, and a pass 1 ms and another 0.1 ms per sample: 64 samples are nearly as fast as 128.
FIXED, START, EACH = 4.0, 1.0, 0.1


def speed(most: int = 128, world: int = 1, waits: float = 0.0) -> Speed:
    sizes = (Timed(size, FIXED, START + EACH * size, waits) for size in sizes_to_time(most))
    return Speed(world, tuple(sizes))


def by_hand(size: int, most: int, world: int) -> float:
    """Return the least time of a step of ``size`` samples, over the numbers of passes; each more costs ``START``."""
    share = math.ceil(size / world)
    least = math.ceil(share / most)
    return min(FIXED + n * (START + EACH * math.ceil(share / n)) for n in range(least, min(share, least + 5) + 1))


# ---- the time of a step


def test_a_step_is_split_into_what_it_does_once_and_its_passes() -> None:
    timed = Timed.of(8, one_ms=[10.0, 9.0, 90.0], two_ms=[16.0, 16.0, 20.0], data_wait=0.0)
    assert (timed.fixed_ms, timed.pass_ms, timed.step_ms) == (4.0, 6.0, 10.0)


@pytest.mark.parametrize("two_ms", [5.0, 10.0, 30.0])
def test_noisy_times_never_make_a_part_negative(two_ms: float) -> None:
    timed = Timed.of(8, [10.0], [two_ms], 0.0)
    assert timed.fixed_ms >= 0 < timed.pass_ms
    assert timed.step_ms == 10.0


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 7))
def test_the_fastest_step_is_that_of_all_ways_to_cut_it(size: int, most: int, world: int) -> None:
    found = speed(most, world).fastest(size * world)
    assert found is not None
    per_gpu, passes, step_ms = found
    assert per_gpu <= most
    assert per_gpu * passes * world >= size * world
    assert step_ms == pytest.approx(by_hand(size * world, most, world), rel=1e-9)


def test_a_longest_step_leaves_no_way_for_a_large_batch() -> None:
    assert speed().fastest(128, max_step_ms=18.0) is not None
    assert speed().fastest(1024, max_step_ms=18.0) is None


def test_a_step_is_cut_as_the_plan_cuts_it() -> None:
    """Micro-batches have whole granules, and equal sizes where they have to be."""
    timed = Speed(1, tuple(Timed(size, FIXED, START + EACH * size, 0.0) for size in (8, 16)))
    assert timed.fastest(24) == (12, 2, pytest.approx(8.4))
    assert replace(timed, granule=8).fastest(24) == (16, 2, pytest.approx(9.2))
    assert replace(timed, granule=8, even=True).fastest(24) == (8, 3, pytest.approx(9.4))
    assert replace(timed, world=2, even=True).fastest(60) == (15, 2, pytest.approx(9.0))
    assert replace(timed, world=2).fastest(62) == (16, 2, pytest.approx(9.2))
    assert replace(timed, world=2, even=True).fastest(62) is None  # 31 per rank


@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_a_run_at_the_fastest_size_takes_as_many_passes(
    granules: int, granule: int, world: int, even: bool, bitwise: bool
) -> None:
    sizes = tuple(Timed(size, FIXED, START + EACH * size, 0.0) for size in sizes_to_time(50 * granule, granule))
    size = granules * granule * world
    found = Speed(world, sizes, granule, even, bitwise).fastest(size)
    assert found is not None
    cut = solve(world, global_size=size, per_gpu=found[0], granule=granule, even=even, bitwise=bitwise)
    assert (cut.micro_batches[0][0], cut.accumulation) == found[:2]


def test_a_speed_whose_times_spread_by_more_than_half_isnt_known() -> None:
    plan = resolve(compose(["task=digits"]), 1)
    for spread, known in ((0.5, True), (0.51, False)):
        timed = Speed(1, (Timed(8, 1.0, 1.0, 0.0, spread),)).plain()
        assert (known_speed({"speed": timed}, plan) is not None) == known
        assert ("isn't known" in unknown(spread)) == (not known)
        picture = picture_of({"speed": timed})
        assert picture is not None
        assert any("within" in curve.name for curve in picture.panels[0].curves) == known
    assert known_speed({}, plan) is None


def test_the_knee_is_the_smallest_size_that_is_nearly_as_fast() -> None:
    times = {8: 2.0, 16: 2.0, 32: 3.9, 64: 7.9}
    assert Speed(1, tuple(Timed(size, 0.0, ms, 0.0) for size, ms in times.items())).knee.per_gpu == 16


def test_two_sizes_of_one_speed_differ_by_less_than_the_spread_of_their_times() -> None:
    """In 95 % of cases, for times with normal errors, also where a slow moment hits one time of five."""
    random, within = Random(0), 0
    for _ in range(2000):
        times = [
            [random.gauss(100, 5) + (80 if size == repeat == 0 else 0) for repeat in range(5)] for size in range(8)
        ]
        speed = Speed(1, tuple(Timed.of(8, one, one, 0.0) for one in times))
        within += abs(statistics.median(times[0]) / statistics.median(times[1]) - 1) <= speed.spread
    assert 0.92 <= within / 2000 <= 0.98


def test_a_machine_that_is_slow_in_some_rounds_neither_blurs_nor_biases_the_times() -> None:
    random, true = Random(0), [1.0, 1.5, 4.0, 10.0]
    rounds = [1.0, 3.0, 2.5, 1.1, 2.0]
    times = [[slow * size * random.gauss(1, 0.01) for slow in rounds] for size in true]
    settled = without_slow_rounds(times)
    timed = [Timed.of(8, one, one, 0.0) for one in settled]
    assert Speed(1, tuple(timed)).spread < 0.05 < 0.5 < Speed(1, tuple(Timed.of(8, t, t, 0.0) for t in times)).spread
    medians = [statistics.median(one) for one in settled]
    assert [one / medians[0] for one in medians] == pytest.approx(true, rel=0.03)


def test_a_knee_isnt_told_by_less_than_the_spread() -> None:
    def speed(spread: float) -> Speed:
        return Speed(1, tuple(Timed(size, 0.0, ms, 0.0, spread) for size, ms in ((8, 1.0), (16, 1.9), (32, 3.5))))

    assert speed(0.01).knee.per_gpu == 32
    assert speed(0.1).knee.per_gpu == 16
    assert speed(0.2).knee.per_gpu == 8


@pytest.mark.parametrize(
    ("world", "waits", "bound"), [(1, 0.0, "compute"), (1, 0.5, "data"), (2, 0.0, "communication"), (2, 0.5, "data")]
)
def test_what_bounds_a_step_is_named(world: int, waits: float, bound: str) -> None:
    sizes = (Timed(8, 5.0, 5.0, waits),)
    assert Speed(world, sizes).bound == bound


def test_a_stored_speed_is_read_back() -> None:
    stored = json.loads(json.dumps(speed(waits=0.25).plain()))
    assert Speed.parse(stored) == speed(waits=0.25)


# ---- the recommendation


def linear(size: int) -> float:
    return 0.1 * size / 64


def asked(witnesses: list[Witness], **changes: Any) -> Any:
    sizes = candidates(8, 4096)
    usual: dict[str, Any] = {"stretches": [(64, 64_000)], "speed": speed(), "sizes": sizes, "lr": linear}
    return recommend(witnesses=witnesses, **(usual | changes))


@pytest.mark.parametrize("critical", [10.0, 100.0, 1000.0])
def test_the_recommended_batch_is_nearly_the_fastest_by_brute_force(critical: float) -> None:
    def seconds(size: int) -> float:
        return 64_000 * (1 + size / critical) / (1 + 64 / critical) / size * by_hand(size, 128, 1) / 1000

    best = asked([Witness("noise", critical)]).best
    assert best.seconds == pytest.approx(seconds(best.global_size))
    assert best.seconds <= 1.05 * min(map(seconds, range(8, 4096)))  # the grid has a ratio of 1.5, near a flat optimum


def test_the_frugal_batch_needs_few_samples_and_isnt_larger_than_the_fast_one() -> None:
    found = asked([Witness("noise", 200.0)])
    fewest = min(row.samples for row in found.rows)
    assert found.frugal.samples <= 1.05 * fewest
    assert found.frugal.global_size == max(row.global_size for row in found.rows if row.samples <= 1.05 * fewest)
    assert found.low <= found.frugal.global_size <= found.best.global_size <= found.high


def test_the_runs_own_batch_needs_its_own_samples() -> None:
    (own,) = [row for row in asked([Witness("noise", 77.0)]).rows if row.global_size == 64]
    assert (own.samples, own.steps, own.lr) == (pytest.approx(64_000), pytest.approx(1000), 0.1)


@pytest.mark.parametrize(
    ("own", "spread", "expected"), [(8, 0.05, 96), (8, 0.4, 64), (128, 0.05, 128), (4096, 0.05, 256)]
)
def test_of_batches_that_take_the_same_time_the_nearest_to_the_runs_own_is_recommended(
    own: int, spread: float, expected: int
) -> None:
    """That costs at most a tenth of the time, however much the measured times spread."""
    sizes = tuple(Timed(size, 4.0, 0.2 * size, 0.0, spread) for size in (8, 512))
    found = asked([Witness("noise", 1000.0)], speed=Speed(1, sizes), stretches=[(own, 64_000)])
    tolerance, least = min(spread, 0.1), min(row.seconds for row in found.rows)
    equal = [row.global_size for row in found.rows if row.seconds <= (1 + tolerance) * least]
    assert found.best.global_size == expected
    assert f"{equal[0]} to {equal[-1]} take the same time within {tolerance:.0%}" in found.why


def test_a_run_whose_batch_changes_makes_the_progress_of_all_its_stretches() -> None:
    halves = asked([Witness("noise", 100.0)], stretches=[(64, 32_000), (192, 32_000)])
    (row,) = [row for row in halves.rows if row.global_size == 96]
    assert row.samples == pytest.approx(32_000 * (1.96 / 1.64 + 1.96 / 2.92))
    (again,) = [row for row in asked([Witness("noise", 100.0)], stretches=[(64, 1000), (64, 63_000)]).rows
                if row.global_size == 64]  # fmt: skip
    assert again.samples == pytest.approx(64_000)


def test_the_interval_of_the_critical_batch_widens_the_range() -> None:
    sure, unsure = (asked([Witness("noise", 200.0, *bounds)]) for bounds in ((190.0, 210.0), (20.0, 4000.0)))
    assert unsure.low <= sure.low
    assert unsure.high > sure.high
    assert unsure.best == sure.best


def test_batches_at_which_the_rule_doesnt_hold_arent_recommended() -> None:
    found = asked([Witness("noise", 1000.0)], lr=lambda size: linear(size) if size <= 128 else None)
    assert max(row.global_size for row in found.rows) == 128


def test_a_longest_step_excludes_batches_or_leaves_none() -> None:
    found = asked([Witness("noise", 1000.0)], max_step_ms=12.0)
    assert max(row.step_ms for row in found.rows) <= 12.0
    assert asked([Witness("noise", 1000.0)], max_step_ms=0.1) is None


def test_without_any_critical_batch_the_run_keeps_its_batch() -> None:
    found = asked([])
    assert (found.best.global_size, found.best.samples, found.frugal) == (64, None, None)
    assert "no measurement tells" in found.why


def test_without_a_speed_the_critical_batch_itself_is_recommended() -> None:
    found = asked([Witness("noise", 200.0)], speed=None)
    assert (found.best.global_size, found.best.seconds) == (192, None)


def test_what_parts_couldnt_tell_is_said_beside_the_others() -> None:
    checkpoint = {"samples": 900, "note": "branches up to 8 × don't differ enough: it is 163 or more"}
    said = unknowns({"scale": None, "over_run": 164.0}, {"critical_batch": None, "course": [checkpoint]})
    assert ["isn't known at the end" in said[0], "163 or more" in said[1], "from sample 900" in said[1]] == [True] * 3
    assert unknowns({}, {}) == unknowns({"scale": 3.0, "over_run": 3.0}, {"critical_batch": 9.0, "course": []}) == []
    assert "noise 164 [?, ?]" in agreement([Witness("noise", 164.0)])


def test_branches_are_trusted_more_than_noise_and_a_disagreement_is_said() -> None:
    noise, branch = Witness("noise", 100.0, 80.0, 130.0), Witness("branch", 900.0)
    assert "900 (branch)" in asked([branch, noise]).why
    said = agreement([branch, noise])
    assert "disagree by × 9" in said
    assert "100 [80, 130]" in said
    assert "uses branch" in said
    assert "agree within × 1.5" in agreement([noise, Witness("branch", 150.0)])


@pytest.mark.parametrize(
    ("batch", "said"),
    [(96.0, "agrees with the batch of few samples, 64"), (512.0, "is 8 × the batch"), (16.0, "is 0.25 ×")],
)
def test_the_law_is_compared_with_the_batch_of_few_samples(batch: float, said: str) -> None:
    assert said in law_compared(batch, batch / 2, 2 * batch, 64)
    assert "few samples" not in law_compared(batch, batch / 2, 2 * batch, None)


@given(st.integers(1, 100), st.integers(1, 10_000), st.integers(1, 64))
def test_candidates_are_multiples_within_bounds(least: int, more: int, quantum: int) -> None:
    sizes = candidates(least, least + more, quantum)
    assert sizes == sorted({*sizes})
    assert all(size % quantum == 0 or size == quantum for size in sizes)


def test_the_critical_batch_of_a_run_is_that_of_its_progress_under_a_changing_noise() -> None:
    """Train step by step under the law that the docstring states, and fit E(B) = E_min + S_min·B by two batches."""
    course, batch, samples = [(100.0, 20.0), (200.0, 80.0), (300.0, 320.0)], 10, 400

    def scale_at(progress: float) -> float:
        """Return the noise scale where the run itself has made this progress: B₀ + φ samples for each unit of it."""
        left, start = progress, 0.0
        for end, scale in [*course[:-1], (samples, course[-1][1])]:
            part = (end - start) / (batch + scale)
            if left < part:
                return scale
            left, start = left - part, end
        return course[-1][1]

    stretches = ((100, 20.0), (100, 80.0), (200, 320.0))
    whole = sum(length / (batch + scale) for length, scale in stretches)
    parts = 20_000
    scales = [scale_at(whole * (number + 0.5) / parts) for number in range(parts)]
    needed = {size: sum(size + scale for scale in scales) * whole / parts for size in (1, 1001)}
    slope = (needed[1001] - needed[1]) / 1000
    assert over_run(course, [(batch, samples)]) == pytest.approx((needed[1] - slope) / slope, rel=1e-3)


def test_the_noise_over_a_run_follows_the_batch_along_it() -> None:
    parts = [(100, 32, 10.0), (50, 32, 40.0), (150, 64, 40.0)]  # samples, batch, noise scale
    weights = [samples / (batch + scale) for samples, batch, scale in parts]
    expected = sum(weight * scale for weight, (_, _, scale) in zip(weights, parts, strict=True)) / sum(weights)
    assert over_run([(100, 10.0), (200, 40.0)], [(32, 150), (64, 150)]) == pytest.approx(expected)


def test_a_noise_that_isnt_known_says_nothing_about_the_run() -> None:
    assert over_run([], [(10, 100)]) is None
    assert over_run([(50, 30.0)], [(10, 100)]) == pytest.approx(30.0)


# ---- tune.json


def test_results_are_reused_under_the_same_conditions_only(tmp_path: Path) -> None:
    Results(tmp_path).put("noise", {"scale": 3.0}, {"world": 1})
    again = Results(tmp_path)
    again.read()
    found = again.get("noise", {"world": 1})
    assert found is not None
    assert found["scale"] == 3.0
    assert again.get("noise", {"world": 2}) is None
    assert again.get("speed", {"world": 1}) is None


def test_two_commands_that_write_at_once_keep_each_others_parts(tmp_path: Path) -> None:
    """Both have read the file before the other one writes; the processes then write at the same time."""
    names = [f"part-{number}" for number in range(4)]
    opened = {name: Results(tmp_path) for name in names}
    for results in opened.values():
        results.read()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_put_often, args=(opened[name], name)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    stored = Results(tmp_path)
    stored.read()
    assert {name: part["count"] for name, part in stored.parts.items()} == dict.fromkeys(names, 9)


def _put_often(results: Results, name: str) -> None:
    for count in range(10):
        results.put(name, {"count": count})


def test_numbers_that_arent_finite_are_stored_as_null(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.put("lr", {"curve": [[1.0, math.nan], [2.0, math.inf]], "suggested": 0.1})
    assert results.parts["lr"] == {"curve": [[1.0, None], [2.0, None]], "suggested": 0.1}
    results.read()
    assert results.parts["lr"]["curve"] == [[1.0, None], [2.0, None]]


@pytest.mark.parametrize("content", ["", "[]", '{"noise": 3}', "{", '{"noise": {"a": NaN}}'])
def test_a_damaged_file_is_rejected_with_a_fix(tmp_path: Path, content: str) -> None:
    results = Results(tmp_path)
    results.folder.mkdir()
    results.file.write_text(content)
    with pytest.raises(UserError, match=r"tune\.json is damaged.*remove it"):
        results.read()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"noise": {"over_run": "high"}}, "noise.over_run is 'high', and has to be a number or null"),
        (
            {"speed": {"sizes": [{"per_gpu": 1}, {"per_gpu": 2.5}]}},
            "speed.sizes.1.per_gpu is 2.5, and has to be a count",
        ),
        ({"speed": {"sizes": 3}}, "speed.sizes is 3, and has to be a list"),
        ({"lr": {"suggestion": "0.1"}}, "lr.suggestion is '0.1', and has to be a number or null"),
        (
            {"branch": {"course": [{"branches": [{"lr": None}]}]}},
            "branch.course.0.branches.0.lr is None, and has to be a number",
        ),
        ({"memory": {"per_gpu": None}}, "memory.per_gpu is None, and has to be a count"),
        ({"branch": {"interval": [1.0, True]}}, "branch.interval.1 is True"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key_and_file(tmp_path: Path, part: Any, named: str) -> None:
    results = Results(tmp_path)
    results.folder.mkdir()
    results.file.write_text(json.dumps(part))
    with pytest.raises(UserError) as error:
        results.read()
    assert str(results.file) in str(error.value)
    assert named in str(error.value)


# ---- the picture


def tuned_parts() -> dict[str, Any]:
    witness = Witness("noise", 200.0, 100.0, 400.0)
    found = asked([witness]).plain(lambda row: f"python launch.py batch.global_size={row.global_size}")
    course = [{"samples": 100 * i, "scale": 10.0 * i, "low": 5.0 * i, "high": 20.0 * i} for i in range(1, 5)]
    return {"speed": speed().plain(), "noise": {"scale": 40.0, "course": course}, "recommendation": found}


def test_the_picture_has_a_panel_for_each_part_with_a_curve() -> None:
    picture = picture_of(tuned_parts())
    assert picture is not None
    assert [panel.title for panel in picture.panels] == [
        "Speed", "Gradient noise scale", "Predicted samples to the target", "Predicted seconds to the target",
    ]  # fmt: skip
    marked = {curve.name: curve.x for curve in picture.panels[-1].curves if curve.kind == "points"}
    assert marked["recommended"] == [asked([Witness("noise", 200.0)]).best.global_size]


def test_the_range_test_is_marked_with_its_limit_and_the_runs_own_lr_if_it_got_that_far() -> None:
    curve = [[rate, 2.0 - rate, rate, 2.0 - rate] for rate in (0.01, 0.1, 1.0)]
    part = {"curve": curve, "suggestion": 0.09, "steepest": 0.09, "largest_stable": 0.9, "run_lr": 3.0}
    picture = picture_of({"lr": part})
    assert picture is not None
    marked = {curve.name: curve.x for curve in picture.panels[0].curves if curve.kind == "points"}
    assert marked == {"suggested, steepest": [0.1], "largest stable": [1.0]}
    shown = picture_of({"lr": {**part, "run_lr": 0.011}})
    assert shown is not None
    assert "the run's LR" in [curve.name for curve in shown.panels[0].curves]


def test_the_noise_is_drawn_with_the_batches_that_the_text_names() -> None:
    noise = {**tuned_parts()["noise"], "batch": 64, "over_run": 219.4}
    picture = picture_of({"noise": noise})
    assert picture is not None
    (panel,) = picture.panels
    heights = {curve.name: {*curve.y} for curve in panel.curves if curve.kind == "line"}
    assert heights == {"φ, over the run: 219": {219.4}, "B₀, the run's batch: 64": {64}}
    assert panel.legend


@pytest.mark.parametrize(("limit", "log"), [(3.0, False), (300.0, True)])
def test_the_limit_of_the_memory_is_drawn_however_far_it_is(limit: float, log: bool) -> None:
    probes = [{"per_gpu": 2, "peak_gb": 1.0}, {"per_gpu": 8, "peak_gb": 2.0}, {"per_gpu": 9, "peak_gb": None}]
    part = {"probes": probes, "limit_gb": limit, "limit_from": "the GPU", "margin": 0.2}
    picture = picture_of({"memory": part})
    assert picture is not None
    (panel,) = picture.panels
    assert [curve.y for curve in panel.curves[1:]] == [[pytest.approx(0.8 * limit)] * 2, [limit] * 2]
    assert panel.y_log == log


@pytest.mark.parametrize("part", ["speed", "noise", "recommendation"])
def test_a_part_with_other_content_is_left_out_of_the_picture(part: str) -> None:
    picture = picture_of({**tuned_parts(), part: {"course": 3, "sizes": [{}], "predictions": [1]}})
    assert picture is not None
    assert len(picture.panels) == {"speed": 3, "noise": 3, "recommendation": 2}[part]


def test_the_batch_of_half_speed_stands_beside_a_recommendation() -> None:
    """Steps that take 2 ms and 1 ms per 100 samples reach half of the highest speed at 200."""
    plan = resolve(compose(["task=text", "batch.unit=tokens", "batch.global_size=4096"]), 1)
    rows = [Prediction(size, size, 1, 0.1, None, None, None, 2 + size / 100) for size in (64, 128, 256)]
    assert "control=goodput control.half_speed=12800 " in moving(plan, rows)
    unknown_times = [replace(row, step_ms=None) for row in rows[1:]]
    assert moving(plan, [rows[0], *unknown_times]) == ""
    assert moving(plan, [replace(row, step_ms=1.0) for row in rows]) == ""  # overhead alone
