"""Test the table that shows a plan."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from isobatch.conf.compose import compose
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_table import WIDTHS, table
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment
from tests.support.golden import golden

TASK = (
    "task=custom",
    "task._target_=my_package.MyTask",
    "task.name=faces",
    "task.train_samples=1437",
    "task.family=images",
    "duration=20ep",
    "optimizer.usual={lr: 0.1, batch: 256}",
)
PLANS = {
    "one worker": (["lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024"], 1),
    "uneven": (["batch.global_size=2100", "batch.per_gpu=7", "lr.decay=step", "lr.warmup=0"], 160),
    "bitwise": (["lr.peak=0.3", "batch.global_size=100", "batch.per_gpu=24", "numerics=bitwise"], 3),
    "unopened data": (["task.train_samples=null", "lr.peak=0.3", "batch.global_size=2"], 3),
    "ZeRO": (["lr.peak=0.3", "engine=deepspeed", "engine.stage=2", "ema=1ep", "optimizer=adamw"], 2),
}


@cache
def plan_of(*overrides: str, world: int) -> Plan:
    return replace(resolve(compose([*TASK, *overrides]), world), identity="0123456789ab")


def staged() -> Plan:
    tokens = ("task.family=language", "task.units_per_sample=512", "task.train_samples=100000", "batch.unit=tokens")
    sizes = ("batch.global_size=524288", "batch.per_gpu=65536", "lr.base=0.001", "lr.base_batch=131072")
    plan = plan_of(*tokens, *sizes, "optimizer=adamw", "lr.decay=wsd", "lr.final=0.1", world=3)
    later = (Segment(50_000, 2048, Rule("sqrt")), Segment(80_000, 4096, Rule("sqrt")))
    return replace(plan, segments=(*plan.segments, *later))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_tables_equal_their_golden_file() -> None:
    plans = {name: plan_of(*overrides, world=world) for name, (overrides, world) in PLANS.items()}
    tables = {name: table(plan, full=True) for name, plan in (plans | {"stages of tokens": staged()}).items()}
    assert all(len(line) <= WIDTHS[1] for text in tables.values() for line in text.splitlines())
    golden("plans", "\n\n".join(f"{name}:\n{text}" for name, text in tables.items()) + "\n")


def test_table_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines break only between words. A very narrow terminal gets the minimum width."""
    plan = staged()
    wide = table(plan)
    for columns in (100, 72, 20):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = table(plan).splitlines()
        assert max(map(len, lines)) == max(columns, WIDTHS[0])
        assert "".join(lines).replace("─", "").split() == "".join(wide.splitlines()).replace("─", "").split()


def test_the_short_table_omits_details() -> None:
    plan = plan_of("optimizer=sgd", "lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024", world=1)
    chosen = replace(plan, optimizer=replace(plan.optimizer, why="auto, at 1,024 samples: it suits; or optimizer=lars"))
    short, full = table(chosen).splitlines(), table(chosen, full=True).splitlines()
    left_out = [line for line in full if line not in short]
    assert [line.partition("  ")[0] for line in left_out] == ["", "SGD's noise", "seed"]
    assert "it suits; or optimizer=lars" in left_out[0]
    assert any(line.endswith("  it suits") for line in short)


@pytest.mark.parametrize(
    ("decay", "text"),
    [
        ("cosine", "no warmup, then cosine decay to 0.04"),
        ("linear", "no warmup, then linear decay to 0.04"),
        ("polynomial", "no warmup, then polynomial decay (exponent 3) to 0.04"),
        ("constant", "no warmup, then constant"),
    ],
)
def test_every_decay_is_described(decay: str, text: str) -> None:
    plan = plan_of("lr.base=0.1", "lr.base_batch=256", "batch.global_size=1024", world=1)
    assert plan.schedule
    schedule = replace(plan.schedule, decay=decay, warmup_samples=0, final=0.1, exponent=3.0)
    assert f"\nschedule       {text}\n" in table(replace(plan, schedule=schedule))
