"""Test that action=evaluate gives the run's values on any number of ranks, and test interrupted evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isobatch.conf.compose import compose
from isobatch.trainers.checkpoints.weights import initialise
from isobatch.trainers.loop.evaluate_weights import evaluate_weights, measure_weights
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from tests.support.harness import Run, Runs, evaluator, in_ranks, session_of, write_final
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.ranks.test_evaluate_action.Normed", "batch.global_size=20", "lr.peak=0.05")


class Normed(Counted):
    """A task with running statistics, which draws its validation samples when it is made."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.chosen = torch.randperm(500)[:41]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(8), *super().model())

    def val_data(self) -> Any:
        return torch.utils.data.Subset(self.train_data(), self.chosen.tolist())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    overrides = ("duration=30st", "ema=100sa", "checkpoint.best=val/loss:max", "evaluate.every=10st")
    return Runs(tmp_path_factory.mktemp("trained"))(2, *TASK, *overrides)


def evaluated(run: Path, world: int, source: Path, *overrides: str) -> list[Any]:
    """Return (source, values) by rank."""
    config = compose(["action=evaluate", f"init_from={source}", *overrides])
    return in_ranks(world, lambda ranks: measure_weights(session_of(config, ranks)), run)


def values_at(run: Run, step: int) -> Any:
    [line] = [line for line in run.metrics() if "val/loss" in line and line["step"] == step]
    return {name: pytest.approx(value, rel=1e-6) for name, value in line.items() if "/" in name}


@pytest.mark.parametrize(("world", "per_gpu"), [(1, 100), (3, 4)])
def test_values_equal_those_of_the_run(trained: Run, tmp_path: Path, world: int, per_gpu: int) -> None:
    """Compare the last step and the average, on other numbers of ranks and in other batches."""
    for source in (trained.run.path, trained.run.checkpoints / "step-00000030"):
        found = evaluated(tmp_path / source.name, world, source, f"batch.per_gpu={per_gpu}")
        assert [values for _, values in found] == [values_at(trained, 30)] * world
        assert found[0][1].keys() == {"val/loss", "ema/loss"}
        file = source / "final/model.safetensors"
        assert {path for path, _ in found} == {str(file if file.exists() else source)}


def test_the_best_checkpoint_has_the_best_values(trained: Run, tmp_path: Path) -> None:
    best = max((10, 20, 30), key=lambda step: values_at(trained, step)["val/loss"].expected)
    [(path, values)] = evaluated(tmp_path / "ranks", 1, trained.run.checkpoints / "best")
    assert (Path(path).name, values) == (f"step-{best:08d}", values_at(trained, best))


def test_weights_file_has_no_average(trained: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((trained.run.final / "model.safetensors").read_bytes())
    [(path, values)] = evaluated(tmp_path / "ranks", 1, file, *TASK)
    assert (path, values) == (str(file), {"val/loss": values_at(trained, 30)["val/loss"]})


def acted(world: int, folder: Path, *overrides: str) -> Any:
    config = compose(["action=evaluate", *TASK, *overrides])

    def body(ranks: World) -> Any:
        end = evaluate_weights(session_of(config, ranks), print)
        return end.state, end.exit_code

    return in_ranks(world, body, folder)


class Chatty(Normed):
    def val_data(self) -> Any:
        print("reading …")
        return super().val_data()


def test_rank_0_prints_a_line(trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(trained.run.path.rglob("*"))
    assert acted(2, tmp_path / "ranks", f"init_from={trained.run.path}") == [["finished", 0]] * 2
    loss, ema = (values_at(trained, 30)[f"{kind}/loss"].expected for kind in ("val", "ema"))
    line = f"val/loss {loss:.4f} · ema/loss {ema:.4f} · {trained.run.path}/final/model.safetensors"
    assert capfd.readouterr().out.splitlines().count(line) == 1
    assert sorted(trained.run.path.rglob("*")) == before


def test_json_is_the_only_output_on_stdout(trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is valid JSON even if a value isn't finite."""
    model = Normed().model()
    initialise(model, str(trained.run.path), World(0, 1, 0, 1, torch.device("cpu"), None))
    nn.init.constant_(model[1].weight, float("nan"))  # type: ignore[index]
    run = trained.run.__class__(tmp_path)
    write_final(run, model, None)
    target = TASK[1].replace("Normed", "Chatty")
    acted(2, tmp_path / "ranks", target, f"init_from={tmp_path}", "output=json")
    out, err = capfd.readouterr()
    assert json.loads(out) == {"source": f"{tmp_path}/final/model.safetensors", "val/loss": None}
    assert err.count("reading …") == 2


class Unvalidated(Normed):
    def val_data(self) -> Any:
        return None


REFUSALS = {
    "task._target_=tests.ranks.test_evaluate_action.Unvalidated": "task custom has no validation data",
    "task.args.width=16": "doesn't fit the model: it has other shapes: 1.weight [32, 8], not [16, 8]",
    "init_from=tests": "init_from=tests has no weights",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_mistakes_are_rejected_on_all_ranks(trained: Run, tmp_path: Path, override: str) -> None:
    ends = evaluated(tmp_path / "ranks", 2, trained.run.path, override)
    assert [end["raised"] for end in ends] == ["UserError"] * 2
    assert REFUSALS[override] in ends[0]["message"]


class Large(Normed):
    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        if len(batch[2]) > 5:
            raise torch.OutOfMemoryError
        return {"units": (batch[2].sum(), len(batch[2]))}


def test_out_of_memory_halves_the_batch(trained: Run, tmp_path: Path) -> None:
    """The watch reports the batch size, and the next start uses at most half of it."""
    target = TASK[1].replace("Normed", "Large")
    config = compose(["action=evaluate", target, f"init_from={trained.run.path}"])

    def body(ranks: World) -> Any:
        first = session_of(config, ranks)
        with pytest.raises(torch.OutOfMemoryError):
            evaluate_weights(first, print)
        limit = first.watch.reached.half
        return limit, evaluate_weights(session_of(config, ranks, per_gpu_limit=limit), print).state

    assert in_ranks(2, body, tmp_path / "ranks") == [[5, "finished"]] * 2


class Interrupted(Counted):
    """A task that asks for a stop at its third batch if ``here``."""

    def __init__(self, stop: Stop, here: bool) -> None:
        super().__init__()
        self.stop, self.here, self.batches = stop, here, 0

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Any, Any]]:
        self.batches += 1
        if self.here and self.batches == 3:
            self.stop.wanted = "SIGTERM"
        return {"units": (batch[2].sum(), len(batch[2]))}


def interrupt(is_stopped: Callable[[World], bool]) -> Callable[[World], Any]:
    """Return a function for ranks that stops an evaluation on some of them, and evaluates again."""

    def body(ranks: World) -> Any:
        stop, watch = Stop(), Watch()
        task = Interrupted(stop, is_stopped(ranks))
        model = task.model().train()
        evaluate = evaluator(task, model, ranks, 1, stop=stop, watch=watch)
        interrupted, batches = evaluate(), task.batches
        assert watch._row[0] == batches
        stop.wanted = None
        return interrupted, batches, model.training, evaluate()

    return body


@pytest.mark.parametrize("world", [1, 2, 4])
def test_stop_on_one_rank_interrupts_the_evaluation_on_all(tmp_path: Path, world: int) -> None:
    """The stopped rank ends its evaluation at once. The next evaluation has all samples."""
    last = world - 1
    ends = in_ranks(world, interrupt(lambda ranks: ranks.rank == last), tmp_path)
    shares = [37 // world + (rank < 37 % world) for rank in range(last)]
    whole = {"units": pytest.approx(float(Counted().units[:37].sum()) / 37)}
    assert ends == [[None, batches, True, whole] for batches in (*shares, 3)]


def test_a_stop_ends_the_action(trained: Run, tmp_path: Path) -> None:
    config = compose(["action=evaluate", *TASK, f"init_from={trained.run.path}"])

    def body(ranks: World) -> Any:
        stop = Stop()
        stop.wanted = "SIGTERM" if ranks.rank == 1 else None
        end = evaluate_weights(session_of(config, ranks, stop), print)
        return end.state, end.cause, end.exit_code

    assert in_ranks(2, body, tmp_path / "ranks") == [["stopped", "SIGTERM", 75]] * 2
