"""Test which weights are evaluated and saved for optimizers with train() and eval(), such as schedule-free ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch

from isobatch.scaling.order import indices
from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.tensors.slices import Reader
from tests.ranks.test_evaluate_action import evaluated
from tests.support.harness import Run, Runs, distance
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.ranks.test_schedule_free.Plain", "batch.global_size=25")
FREE = (
    *TASK, "duration=8st", "lr.peak=0.05", "lr.decay=constant", "lr.warmup=0", "evaluate.every=4st", "ema=100sa",
    "optimizer=custom", "optimizer.weight_decay=0.1",
)  # fmt: skip


class Plain(Counted):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)


class StartsInEval(torch.optim.SGD):
    """An optimizer that starts in eval mode, evaluates weights shifted by 1, and keeps no mode in its groups."""

    training = False

    def train(self) -> None:
        self._move(-1.0 if not self.training and self.state else 0.0)
        self.training = True

    def eval(self) -> None:
        self._move(1.0 if self.training and self.state else 0.0)
        self.training = False

    @torch.no_grad()
    def _move(self, by: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(by)

    def step(self, closure: Any = None) -> Any:
        assert self.training
        return super().step(closure)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Runs(tmp_path_factory.mktemp("whole"))(1, *FREE, "optimizer._target_=schedulefree.AdamWScheduleFree")


def by_hand() -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """Train as in schedulefree's README on the run's samples. Return the last x and y, and the losses of x."""
    task = Plain()
    torch.manual_seed(0)
    model, losses = task.model(), list[float]()
    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    optimizer = schedulefree.AdamWScheduleFree(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.05, weight_decay=0.1
    )
    for step in range(8):
        optimizer.train()
        model.train()
        rows = torch.from_numpy(indices(0, len(task.units), step * 25, step * 25 + 25))
        loss, units = task.loss(model, [part[rows] for part in task.train_data().tensors])
        (loss / units).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, 7):
            y = {name: weight.clone() for name, weight in model.state_dict().items()}
            optimizer.eval()
            loss, units = task.loss(model, task.val_data().tensors)
            losses.append(float(loss / units))
    return model.state_dict(), y, losses


def test_evaluations_and_final_use_the_weights_of_eval(whole: Run, tmp_path: Path) -> None:
    """Compare the run's evaluations, final/, and action=evaluate of a checkpoint, which holds train mode's weights."""
    x, y, losses = by_hand()
    assert distance(whole.weights(), x) < 1e-6  # sums are rounded differently
    assert [line["val/loss"] for line in whole.metrics() if "val/loss" in line] == pytest.approx(losses, rel=1e-6)
    newest = checkpoints(whole.run)[0]
    values = [line for line in whole.metrics() if "val/loss" in line][-1]
    for source in (whole.run.path, newest):
        [(_, found)] = evaluated(tmp_path / source.name, 1, source, *TASK)
        assert found == {name: pytest.approx(values[name], rel=1e-6) for name in ("val/loss", "ema/loss")}
    stored = Reader(read(newest))
    assert distance({name: stored.whole(f"model/{name}") for name in y}, y) < 1e-6
    assert distance(x, y) > 1e-3


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("engine=fsdp", "AdamWScheduleFree"),
        ("engine=ddp", "SGDScheduleFree"),
        ("engine=deepspeed engine.stage=0", "RAdamScheduleFree"),
    ],
)
def test_engines_train_and_resume_schedule_free(runs: Runs, whole: Run, engine: str, name: str) -> None:
    """The run is stopped between two evaluations, and its result is bitwise equal."""
    overrides = (*FREE, f"optimizer._target_=schedulefree.{name}", *engine.split())
    run = runs(2, *overrides)
    again = runs(2, *overrides, resume=runs(2, *overrides, stop_at=5))
    for file in ("model.safetensors", "ema.safetensors"):
        assert distance(run.weights(file), again.weights(file)) == 0
        if name == "AdamWScheduleFree":
            assert distance(whole.weights(file), run.weights(file)) < 1e-5  # Adam's ε amplifies rounding
    assert run.metrics()[-1]["val/loss"] == again.metrics()[-1]["val/loss"]


def test_zero_rejects_schedule_free_by_name(runs: Runs) -> None:
    run = runs(1, *FREE, "optimizer._target_=schedulefree.AdamWScheduleFree", "engine=deepspeed", "engine.stage=1")
    assert run.ends[0]["raised"] == "UserError"
    assert "engine.stage=1 doesn't support optimizer=custom" in run.ends[0]["message"]
    assert "schedulefree.AdamWScheduleFree" in run.ends[0]["message"]


def test_optimizer_that_starts_in_eval_mode_and_hides_its_mode_is_restored(runs: Runs) -> None:
    overrides = (*FREE, "optimizer.weight_decay=null", "optimizer._target_=tests.ranks.test_schedule_free.StartsInEval")
    plain = runs(1, *FREE, "optimizer.weight_decay=null", "optimizer._target_=torch.optim.SGD")
    run = runs(1, *overrides, resume=runs(1, *overrides, stop_at=5))
    assert distance(plain.weights("ema.safetensors"), run.weights("ema.safetensors")) == 0
    assert run.losses() == plain.losses()
