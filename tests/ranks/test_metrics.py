"""Lines of metrics.jsonl: sums over intervals and the task's measures, the same on any cut and after any stop."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.order import indices
from isobatch.trainers.loop.evaluate import measure, summarise
from isobatch.trainers.loop.hardware import peak_tflops
from isobatch.trainers.tasks.losses import summed
from tests.support.harness import Runs
from tests.support.lines import TIMED, untimed
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.ranks.test_metrics.Measured", "lr.peak=0.05")
SAME = (*TASK, "batch.global_size=41", "duration=30st", "log.every=410sa", "evaluate.every=7st")


class Measured(Counted):
    """``Counted`` that measures how many units have the right sign, and how many samples are odd."""

    def __init__(self, change: str = "") -> None:
        super().__init__(dropout=0.0)
        self.change = change

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss, units = super().loss(model, batch)
        inputs, targets, counts = batch
        mask = torch.arange(7) < counts[:, None]
        right = ((model(inputs).sign() == targets.sign()) & mask).sum()
        measures = {"sign": (right, counts.sum()), "odd": ((counts % 2).sum().item(), len(counts))}
        if self.change == "names" and counts[0] == 1:
            measures["one"] = measures["odd"]
        if self.change == "many":
            measures = {f"measure-{index}": (1, 1) for index in range(17)}
        if self.change == "mean":
            measures["sign"] = (right / counts.sum(), counts.sum())
        if self.change == "mean of 1":
            measures["sign"] = (right / counts.sum(), 1)
        return loss, units, measures

    def flops_per_unit(self, model: nn.Module) -> Any:
        return {"zero": 0}.get(self.change, 1e6)


def test_the_step_that_ends_a_run_is_logged(runs: Runs) -> None:
    """Its values aren't finite, so a report sees that the run diverged."""
    run = runs(2, "task=custom", "task._target_=tests.support.tasks.BecomesNaN", "batch.global_size=20", "lr.peak=0.05")
    assert run.ends[0]["raised"] == "RunFailed"
    last = run.metrics()[-1]
    assert f"step {last['step']} " in run.ends[0]["message"]
    assert (last["loss"], last["grad_norm"]) == (None, None)


def test_measures_are_shown(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs(1, *SAME[:-2], "duration=1st")
    assert "train/sign" in capfd.readouterr().out


def test_values_by_hand(runs: Runs) -> None:
    """The loss and the measures are means over the steps since the previous line, and units and time are sums."""
    every = runs(1, *SAME[:-2], "log.every=1st", "evaluate.every=null").metrics()[:-1]
    run = runs(2, *SAME, "batch.per_gpu=7", "log.peak_tflops=0.001")
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 10, 20, 30]
    task, before = Measured(), 0
    for line in lines:
        steps = every[before : line["step"]]
        units = [step["units"] - (every[step["step"] - 2]["units"] if step["step"] > 1 else 0) for step in steps]
        for name in ("loss", "train/sign"):
            mean = sum(step[name] * count for step, count in zip(steps, units, strict=True)) / sum(units)
            assert line[name] == pytest.approx(mean, rel=1e-5), name
        assert line["train/odd"] == pytest.approx(sum(step["train/odd"] for step in steps) / len(steps))
        assert line["units"] == every[line["step"] - 1]["units"]
        rates = [(line[f"{kind}_per_s"], line[kind]) for kind in ("units", "samples")]
        since = lines[lines.index(line) - 1] if before else {"units": 0, "samples": 0, "time_s": 0}
        for (rate, now), kind in zip(rates, ("units", "samples"), strict=True):
            assert rate == pytest.approx((now - since[kind]) / (line["time_s"] - since["time_s"]))
        assert line["mfu"] == pytest.approx(1e6 * line["units_per_s"] / (0.001e12 * 2))
        assert 0 <= line["data_wait"] <= 1
        assert 0.01 < line["memory_gb"] < 100
        before = line["step"]
    rows = indices(0, 500, 0, lines[-1]["samples"])
    assert lines[-1]["units"] == task.units[rows].sum()


def test_evaluations_have_their_own_time_and_the_measures(runs: Runs) -> None:
    evaluations = [line for line in runs(1, *SAME).metrics() if "loss" not in line]
    assert [line["step"] for line in evaluations] == [7, 14, 21, 28, 30]
    assert all({"val/loss", "val/sign", "val/odd"} <= line.keys() and line["evaluation_s"] > 0 for line in evaluations)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_measures_on_every_cut(runs: Runs, engine: str) -> None:
    whole, cut = (
        untimed(runs(*given).metrics()) for given in ((1, *SAME), (3, *SAME, "batch.per_gpu=5", f"engine={engine}"))
    )
    for one, other in zip(whole, cut, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(runs: Runs) -> None:
    """It stops between two lines, twice: sums of the interval are in the checkpoint, and time only grows."""
    same = (*SAME, "batch.per_gpu=41")
    whole = runs(1, *same)
    run = runs(1, *same, stop_at=13)
    run = runs(1, *same, stop_at=26, resume=run)
    run = runs(1, *same, resume=run)
    assert untimed(run.metrics()) == untimed(whole.metrics())
    times = [line["time_s"] for line in run.metrics()]
    assert times == sorted(times)
    assert times[0] > 0


def test_time_doesnt_count_evaluations(runs: Runs) -> None:
    slow = "task._target_=tests.ranks.test_metrics.SlowToEvaluate"
    line = runs(1, *TASK, slow, "batch.global_size=41", "duration=4st", "evaluate.every=2st").metrics()[-1]
    assert line["evaluation_s"] > SlowToEvaluate.SECONDS
    assert line["time_s"] < SlowToEvaluate.SECONDS  # four small steps, also on a loaded machine


class SlowToEvaluate(Measured):
    SECONDS = 3.0

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        time.sleep(self.SECONDS)
        return {"loss": (1.0, 1)}


def test_waiting_for_data_is_measured(runs: Runs) -> None:
    slow = "task._target_=tests.ranks.test_metrics.SlowData"
    lines = runs(2, *TASK, slow, "batch.global_size=4", "duration=20st", "log.every=5st").metrics()[1:-1]
    for before, line in pairwise(lines):
        waited_s = line["data_wait"] * (line["time_s"] - before["time_s"])
        assert waited_s >= 0.01 * (line["samples"] - before["samples"]) / 2  # each rank fetches half of the samples


class SlowData(Measured):
    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        time.sleep(0.01)
        return sample


@pytest.mark.parametrize("name", ["", "top 1", "score:x", "a,b", "f1>0"])
def test_a_measure_that_no_condition_could_name_is_refused(name: str) -> None:
    task, values = Named(), {name: (1.0, 1)}
    for made in (
        lambda: summed((torch.ones(()), 1, values)),
        lambda: measure(task, nn.Identity(), values),
        lambda: summarise(task, values),
    ):
        with pytest.raises(UserError, match=re.escape(repr(name))) as error:
            made()
        assert error.value.key == "task._target_"


class Named(Measured):
    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        return batch

    def summarise(self, totals: Any) -> Any:
        return dict.fromkeys(totals, 1.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [("names", ["'odd', 'one', 'sign'", "'odd', 'sign'"]), ("many", ["17", "16"]), ("zero", ["flops_per_unit", "0"])],
)
def test_rejected(runs: Runs, change: str, named: list[str]) -> None:
    run = runs(1, *TASK, f"task.args.change={change}", "batch.global_size=3", "duration=90st")
    assert run.ends[0]["raised"] == "UserError"
    assert all(word in run.ends[0]["message"] for word in named), run.ends[0]["message"]


@pytest.mark.parametrize(
    "measures", [{"a": 1.0}, {"a": (1, 2, 3)}, {1: (1, 2)}, {"a": (torch.ones(2), 2)}, {"a": ("x", 1)}]
)
def test_measures_have_a_sum_and_a_count(measures: Any) -> None:
    with pytest.raises(UserError, match=r"\{name: \(sum, count\)\}"):
        summed((torch.ones(3), measures))


def test_measures_follow_either_form_of_a_loss() -> None:
    measures = {"a": (torch.tensor([2.0]), 4)}
    forms: list[Any] = [torch.ones(3), (torch.tensor(3.0), 3)]
    for form in forms:
        loss, units, found = summed((form, measures) if isinstance(form, Tensor) else (*form, measures), 3)
        assert (float(loss), units, {name: tuple(map(float, pair)) for name, pair in found.items()}) == (
            3,
            3,
            {"a": (2, 4)},
        )


def test_a_mean_as_a_measure_is_rejected_before_step_1(tmp_path: Path) -> None:
    run = Runs(tmp_path, trial=True)(1, *TASK, "task.args.change=mean", "batch.global_size=32", "duration=2st")
    assert run.ends[0]["raised"] == "UserError"
    assert "'sign'" in run.ends[0]["message"]


def test_a_measure_that_depends_on_the_cut_is_reported(tmp_path: Path) -> None:
    run = Runs(tmp_path, trial=True)(1, *TASK, "task.args.change='mean of 1'", "batch.global_size=32", "duration=2st")
    assert run.ends[0]["state"] == "finished"
    assert [event for event in run.events() if event["event"] == "depends_on_cut" and "'sign'" in event["reason"]]


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),  # isn't an L4
        ("NVIDIA RTX A1000", None),  # isn't an A100
        ("NVIDIA T400", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name: str, narrow: float | None) -> None:
    """A device that isn't known has no peak, rather than that of one whose name its own contains."""
    assert (peak_tflops(name) or [None])[0] == narrow


def test_comparisons_leave_out_only_what_is_logged(runs: Runs) -> None:
    """A name of TIMED that no line has would hide nothing, and may be misspelt."""
    lines = runs(1, *SAME, "log.peak_tflops=0.001").metrics()
    assert {name for line in lines for name in line} >= TIMED
    assert "loss" not in TIMED
