"""Test the controllers of the global batch: their formulas by hand, their limits, and the replay of decisions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isobatch.scaling.control import FEWEST, Control
from isobatch.scaling.tuning.controllers import (
    LATEST,
    LEAST_CHANGE,
    Measurement,
    Memory,
    Timed,
    first_memory,
    half_speed_of,
    measurement_of,
    observed,
    replay,
    values,
)
from tests.support.examples import examples

ROOM = 10**9  # samples that the rest of the run has


def control_of(name: Any = "noise", **changes: Any) -> Control:
    usual: dict[str, Any] = {
        "norm-test": {"eta": 1.0}, "noise": {"factor": 1.25}, "variance": {"alpha": 0.5}, "goodput": {}
    }[name]  # fmt: skip
    fields: dict[str, Any] = {"least": 1, "most": 10**6, "quantum": 1, "every": 100, "patience": 1, "lr": "rule"}
    return Control(name, **(fields | usual | changes))


def seen_of(grad_sq: float | None = 1.0, trace: float | None = 100.0, **changes: Any) -> Measurement:
    fields: dict[str, Any] = {"samples": 1000, "global_size": 64, "growth": 1.0, "loss": 0.5, "step_s": None}
    return Measurement(**(fields | {"grad_sq": grad_sq, "trace": trace} | changes))


def ready(size: int = 64, **changes: Any) -> Memory:
    """Return the memory just before the first decision."""
    return replace(first_memory(size), count=FEWEST - 1, **changes)


def asked(control: Control, seen: Measurement, memory: Memory) -> float:
    return observed(control, memory, seen, ROOM).asked


# ---- formulas; φ is 100 samples unless a case says otherwise

CASES: dict[str, tuple[Control, Measurement, Memory, float]] = {
    # 100/64 = 1.56 against η²·|G|²
    "norm-test doubles": (control_of("norm-test"), seen_of(), ready(64), 128.0),
    "norm-test stays above φ": (control_of("norm-test"), seen_of(), ready(101), 101.0),
    "norm-test stays at φ": (control_of("norm-test"), seen_of(), ready(100), 100.0),
    "norm-test, η squared": (control_of("norm-test", eta=1.2), seen_of(), ready(69), 138.0),  # 100/69 > 1.44
    "norm-test, η squared, above": (control_of("norm-test", eta=1.2), seen_of(), ready(70), 70.0),  # 100/70 < 1.44
    "norm-test, only noise": (control_of("norm-test"), seen_of(grad_sq=-3.0), ready(64), 128.0),
    "norm-test, no noise": (control_of("norm-test"), seen_of(trace=0.0), ready(64), 64.0),
    "norm-test, no gradient": (control_of("norm-test"), seen_of(grad_sq=0.0, trace=0.0), ready(64), 64.0),
    "noise": (control_of("noise"), seen_of(), ready(100), 125.0),
    "noise shrinks": (control_of("noise", factor=0.6), seen_of(), ready(100), 60.0),
    "noise, only noise": (control_of("noise"), seen_of(grad_sq=0.0), ready(100), 200.0),
    "noise, no noise": (control_of("noise"), seen_of(trace=0.0), ready(100), 50.0),
    "variance": (control_of("variance"), seen_of(), ready(64), 114.0),  # 64 + 0.5·100
    "variance adds to what it asked for": (control_of("variance"), seen_of(), ready(64, asked=70.5), 120.5),
    "variance never shrinks": (control_of("variance", alpha=1e-6), seen_of(), ready(64), 64.0001),
    "variance, only noise": (control_of("variance"), seen_of(grad_sq=-1.0), ready(64), 128.0),
    "goodput": (control_of("goodput", half_speed=49.0), seen_of(), ready(64), 70.0),  # √(49·100)
    "goodput under a schedule": (control_of("goodput", half_speed=98.0), seen_of(growth=2.0), ready(64), 70.0),
    "goodput shrinks": (control_of("goodput", half_speed=16.0), seen_of(), ready(64), 40.0),
    "goodput, only noise": (control_of("goodput", half_speed=16.0), seen_of(grad_sq=0.0), ready(64), 128.0),
    "goodput, no clock yet": (control_of("goodput"), seen_of(), ready(81), 90.0),  # √(81·100)
    # 0.5 s for 32 and 1 s for 96 samples: h = 32, and √(32·100) = 56.6
    "goodput by the clock": (
        control_of("goodput"),
        seen_of(),
        ready(64, timed=(Timed(32, (0.5,)), Timed(96, (1.0,)))),
        math.sqrt(3200),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_batch_by_hand(name: str) -> None:
    control, seen, memory, by_hand = CASES[name]
    assert asked(control, seen, memory) == pytest.approx(by_hand, rel=1e-12)


def test_goodput_asks_for_the_batch_with_the_most_progress_per_second() -> None:
    """The product of speed and efficiency of Pollux, searched."""
    control, scale = control_of("goodput", half_speed=300.0), 80.0

    def progress(size: float) -> float:
        return size / (300 + size) * scale / (scale + size)

    best = max(range(1, 1000), key=progress)
    assert asked(control, seen_of(trace=scale), ready(128)) == pytest.approx(best, abs=0.5)


# ---- limits


def test_the_first_decision_is_after_enough_measurements() -> None:
    memory = first_memory(64)
    sizes = []
    for _ in range(FEWEST + 1):
        memory = observed(control_of(), memory, seen_of(), ROOM)
        sizes.append(memory.size)
    assert sizes == [64] * (FEWEST - 1) + [125, 125]
    assert memory.count == FEWEST + 1


@pytest.mark.parametrize("name", ["norm-test", "noise", "variance", "goodput"])
@pytest.mark.parametrize(("grad_sq", "trace"), [(1e-300, 1e300), (-1e300, 1e300), (0.0, 0.0), (1e300, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("timed", [(), (Timed(32, (1.0,)), Timed(64, (2.0,))), (Timed(32, (1.0,)), Timed(64, (1.0,)))])
def test_a_decision_is_at_most_twice_and_at_least_half(
    name: str, grad_sq: float, trace: float, timed: tuple[Timed, ...]
) -> None:
    """Also if the time of a step is in proportion to the batch, or doesn't depend on it."""
    memory = observed(control_of(name), ready(64, timed=timed), seen_of(grad_sq, trace), ROOM)
    assert 32 <= memory.asked <= 128
    assert 32 <= memory.size <= 128


def test_bounds_and_quantum() -> None:
    control = control_of(factor=1.0, least=50, most=150, quantum=32)
    sizes = {
        scale: observed(control, ready(100), seen_of(trace=scale), ROOM).size for scale in (40.0, 70.0, 118.0, 190.0)
    }
    assert sizes == {40.0: 50, 70.0: 64, 118.0: 128, 190.0: 150}


def test_a_change_that_rounds_to_the_same_batch_is_none() -> None:
    control = control_of(factor=1.0, quantum=64)
    memory = observed(control, ready(64), seen_of(trace=80.0), ROOM)
    assert (memory.size, memory.larger) == (64, 1)


def test_a_small_change_is_none() -> None:
    for scale in (64 * LEAST_CHANGE - 1e-9, 64 / LEAST_CHANGE + 1e-9):
        memory = observed(control_of(factor=1.0), ready(64), seen_of(trace=scale), ROOM)
        assert (memory.size, memory.larger, memory.smaller) == (64, 0, 0)
        assert memory.asked == scale
    assert observed(control_of(factor=1.0), ready(64), seen_of(trace=64 * LEAST_CHANGE), ROOM).size == 72
    assert observed(control_of(factor=1.0), ready(72), seen_of(trace=72 / LEAST_CHANGE), ROOM).size == 64


def test_patience_counts_measurements_in_a_row_that_ask_for_the_same_direction() -> None:
    control = control_of(factor=1.0, patience=3)

    def sizes(*scales: float) -> list[int]:
        memory, found = ready(64), []
        for scale in scales:
            memory = observed(control, memory, seen_of(trace=scale), ROOM)
            found.append(memory.size)
        return found

    assert sizes(90, 100, 110) == [64, 64, 110]
    assert sizes(90, 100, 65, 90, 100, 110) == [64] * 5 + [110]  # a small change starts the count again
    assert sizes(90, 100, 40, 40, 40) == [64] * 4 + [40]  # and so does the other direction
    assert sizes(90, 90, 90, 130, 130, 130) == [64, 64, 90, 90, 90, 130]  # and so does a decision


@pytest.mark.parametrize(("room", "size"), [(125, 125), (124, 64), (0, 64), (-500, 64)])
def test_a_batch_that_the_rest_of_the_run_does_not_hold_is_not_chosen(room: int, size: int) -> None:
    assert observed(control_of(), ready(64), seen_of(), room).size == size


def test_a_measurement_that_no_decision_follows_keeps_what_was_asked() -> None:
    memory = observed(control_of("variance", alpha=0.05, patience=2), ready(64), seen_of(), ROOM)
    memory = observed(control_of("variance", alpha=0.05, patience=2), memory, seen_of(), ROOM)
    assert memory.asked == 64 + 2 * 0.05 * 100


# ---- speed


@pytest.mark.parametrize(
    ("timed", "half_speed"),
    [
        ([], None),
        ([Timed(32, (0.5, 0.5))], None),
        ([Timed(32, (0.5,)), Timed(96, (1.0,))], 32.0),
        ([Timed(10, (1.1,)), Timed(20, (1.2,)), Timed(30, (1.3,))], 100.0),
        ([Timed(10, (9.0, 1.1, 0.1)), Timed(30, (1.3, 7.0, 1.2))], 100.0),  # of each batch the median
        ([Timed(32, (1.0,)), Timed(64, (1.0,))], 10**15),  # flat: no batch is large enough
        ([Timed(32, (1.0,)), Timed(64, (0.9,))], 10**15),
        ([Timed(32, (1.0,)), Timed(64, (2.0,))], 1.0),  # in proportion: one sample is enough
        ([Timed(32, (1.0,)), Timed(64, (3.0,))], 1.0),  # a negative intercept
    ],
)
def test_half_speed_by_hand(timed: list[Timed], half_speed: float | None) -> None:
    assert half_speed_of(timed) == (half_speed and pytest.approx(half_speed, rel=1e-9))


def test_a_batch_weighs_as_many_measurements_as_it_has() -> None:
    """Fit 10, 10, 20 and 30 samples in 2, 2, 3 and 3.5 s by hand: on average 17.5 samples and 2.625 s."""
    slope = (2 * -7.5 * -0.625 + 2.5 * 0.375 + 12.5 * 0.875) / (2 * 7.5**2 + 2.5**2 + 12.5**2)
    timed = [Timed(10, (2.0, 2.0)), Timed(20, (3.0,)), Timed(30, (3.5,))]
    assert half_speed_of(timed) == pytest.approx(2.625 / slope - 17.5)


def test_the_latest_times_of_each_batch_are_remembered() -> None:
    memory = first_memory(64)
    for index in range(LATEST + 3):
        memory = observed(control_of(), memory, seen_of(step_s=1.0 + index), ROOM)
    memory = observed(control_of(), memory, seen_of(step_s=None), ROOM)
    memory = observed(control_of(), memory, seen_of(global_size=128, step_s=0.5), ROOM)
    assert memory.timed == (Timed(64, tuple(4.0 + index for index in range(LATEST))), Timed(128, (0.5,)))


# ---- replay

finite = st.floats(-1e3, 1e3)
measurements = st.builds(
    Measurement,
    samples=st.just(0),
    global_size=st.integers(1, 512),
    growth=st.sampled_from([1.0, 2.0, 1.5]),
    grad_sq=finite | st.floats(-1e-3, 1e-3),
    trace=st.floats(0, 1e5),
    loss=st.none() | finite,
    step_s=st.none() | st.floats(1e-6, 1e3),
)
controls = st.builds(
    control_of,
    st.sampled_from(["norm-test", "noise", "variance", "goodput"]),
    least=st.integers(1, 64),
    most=st.integers(64, 4096),
    quantum=st.sampled_from([1, 4, 8, 24]),
    every=st.integers(1, 500),
    patience=st.integers(1, 3),
)


def line_of(seen: Measurement, memory: Memory, rest: int = ROOM) -> dict[str, Any]:
    """Return a line of metrics as it is read from its file."""
    averages = {"noise/grad_sq": seen.grad_sq, "noise/trace": seen.trace}
    line = {"samples": seen.samples, "global_size": seen.global_size, **averages, **values(seen, memory, rest)}
    read: dict[str, Any] = json.loads(json.dumps(line, allow_nan=False))
    return read


@given(measurements, st.integers(1, 10**9))
@example(seen_of(grad_sq=None, trace=None), 3)
@examples(50)
def test_a_measurement_is_read_from_its_line_as_it_was(seen: Measurement, size: int) -> None:
    assert measurement_of(line_of(seen, first_memory(size))) == seen
    assert measurement_of({"samples": 3, "loss": 0.1, "global_size": 4, "noise/trace": 3.0}) is None


@given(controls, st.lists(measurements, max_size=40), st.integers(1, 100))
@examples(100)
def test_a_replay_takes_the_decisions_of_the_run(control: Control, found: list[Measurement], step: int) -> None:
    total = 25 * step * 64
    memory, lines, decisions = first_memory(64), [], []
    for index, measured in enumerate(found):
        seen = replace(measured, samples=(index + 1) * step * 64)
        start, before = seen.samples + control.every, memory
        memory = observed(control, before, seen, total - start)
        lines += [{"samples": seen.samples - 1, "loss": 0.5, "global_size": 64}, line_of(seen, memory, total - start)]
        if memory.size != before.size:
            decisions.append((start, memory.size))
            assert control.least <= memory.size <= control.most
            assert memory.size in (control.least, control.most) or memory.size % control.quantum == 0
            assert start + memory.size * seen.growth <= total
    assert replay(control, 64, lines) == decisions


@pytest.mark.parametrize("grad_sq", [0.0, 1.0])
def test_a_gradient_without_noise_asks_for_no_larger_batch(grad_sq: float) -> None:
    """Such as that of a model whose units are all dead."""
    for name in ("norm-test", "noise", "variance", "goodput"):
        assert asked(control_of(name), seen_of(grad_sq, 0.0), ready(64)) <= 64


def test_speeds_of_other_hardware_are_forgotten() -> None:
    control, memory = control_of("goodput"), first_memory(32)
    for number, hardware in enumerate((1, 1, 2), 1):
        seen = seen_of(samples=number * 100, global_size=32 * number, step_s=0.1 * number, hardware=hardware)
        memory = observed(control, memory, seen, ROOM)
    assert memory.timed == (Timed(96, (pytest.approx(0.3),)),)
    line = json.loads(json.dumps({"samples": 300, "global_size": 96, **values(seen, memory, 1)}))
    assert measurement_of(line) == replace(seen, grad_sq=None, trace=None)
