"""Test the range test of the LR and the sharpness on a regression whose curvature is known, and on a tiny network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.scaling.tuning.speed import Speed, Timed
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tuning import lr, sharpness, speed
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.conditions import conditions_of
from isobatch.trainers.tuning.recommend import recommended
from isobatch.trainers.tuning.sharpness import lanczos
from isobatch.trainers.tuning.tune import open_bench
from tests.support.harness import in_ranks, session_of

SAMPLES, WIDTH = 96, 6
TASK = (
    "task=custom", "batch.global_size=32", "batch.per_gpu=8", "duration=10ep", "lr.peak=0.05", "data.workers=0",
    "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "action=tune",
)  # fmt: skip


class Regression:
    """Linear regression: the Hessian of the mean of ½·(xw − y)² is XᵀX/n, whatever the weights."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        scales = torch.tensor([3.0, 1.5, 1.0, 0.7, 0.5, 0.3])
        self.inputs = torch.randn(SAMPLES, WIDTH, generator=random) * scales
        self.targets = self.inputs @ torch.randn(WIDTH, 1, generator=random) * 3

    def model(self) -> nn.Module:
        return nn.Linear(WIDTH, 1, bias=False)

    def train_data(self) -> TensorDataset:
        return TensorDataset(self.inputs, self.targets)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets, reduction="sum") / 2, len(inputs)

    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.inputs.T.double() @ self.inputs.double() / SAMPLES)[-1])


class Network(Regression):
    """A network with dropout and BatchNorm, both of which would change the loss in train mode."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))


def bench_of(world: World, task: str, *overrides: str) -> Bench:
    target = f"task._target_=tests.ranks.test_tune_curvature.{task}"
    bench = open_bench(session_of(configured([*TASK, target, *overrides]), world))
    assert bench
    return bench


@pytest.mark.parametrize("seed", range(3))
def test_lanczos_finds_the_largest_eigenvalue_of_a_dense_matrix(seed: int) -> None:
    """Not the largest magnitude, and with eigenvalues close together; the error is within its bound."""
    random = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.tensor([-9.0, 5.0, 4.99]), torch.rand(57, generator=random)]).double()
    basis = torch.linalg.qr(torch.randn(60, 60, generator=random, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    start = torch.randn(60, generator=random, dtype=torch.float64)

    def product(vector: list[Tensor]) -> list[Tensor]:
        return list((matrix @ torch.cat([part.flatten() for part in vector])).split((20, 40)))

    found = lanczos(product, list(start.split((20, 40))))
    assert abs(found.value - 5) <= found.error <= 0.01 * found.value
    assert found.products < 40
    assert lanczos(lambda v: [3 * one for one in v], [start]).value == pytest.approx(3)


def write_weights(folder: Path, model: nn.Module) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), file := folder / "model.safetensors")
    return file


def test_the_curvature_is_that_of_the_dense_hessian(tmp_path: Path) -> None:
    """In eval mode, over all samples; a micro-batch has a twelfth of them."""
    torch.manual_seed(1)
    task, model = Network(), Network().model()
    model(task.inputs)  # running statistics that aren't those of a new model
    bench = bench_of(World.alone(), "Network", f"init_from={write_weights(tmp_path, model)}")
    found = sharpness.measure(bench)
    model.eval()
    shapes = [parameter.shape for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        outputs = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (task.inputs,))
        return F.mse_loss(outputs, task.targets, reduction="mean") / 2

    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    hessian: Any = torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]
    assert found["loss"] == pytest.approx(float(loss(flat)), rel=1e-5)
    assert found["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.011)
    assert found["perturbed_deviation"] > 0
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), flat)


def test_sharpness_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Its sums are only rounded in another order; and it is that of the regression."""
    torch.manual_seed(1)
    task = Regression()
    file = write_weights(tmp_path, task.model())

    def body(world: World) -> Any:
        return sharpness.measure(bench_of(world, "Regression", f"init_from={file}"))

    one, other = in_ranks(2, body, tmp_path / "ranks")
    alone = body(World.alone())
    assert one == other
    assert one["sharpness"] == pytest.approx(alone["sharpness"], rel=1e-5)
    assert one["perturbed"] == pytest.approx(alone["perturbed"], rel=1e-4)
    assert alone["sharpness"] == pytest.approx(task.largest(), rel=0.011)
    assert json.dumps(alone, allow_nan=False)


def test_sharpness_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the run first, or give init_from"):
        sharpness.measure(bench_of(World.alone(), "Regression", f"run.dir={tmp_path / 'run'}"))


def test_the_range_test_finds_the_lr_at_which_a_regression_diverges() -> None:
    """It is 2 over the largest curvature; the batch's own curvature is up to half as large again."""
    bench = bench_of(World.alone(), "Regression")
    found = lr.measure(bench)
    limit = 2 / Regression().largest()
    assert limit / 2 < found["largest_stable"] < 2 * limit
    assert found["suggestion"] < limit
    assert (found["batch"], found["run_lr"]) == (32, 0.05)
    assert json.dumps(found, allow_nan=False)
    assert lr.measure(bench) == found  # nothing is left of the first one


def test_a_range_test_of_few_steps_is_rejected() -> None:
    with pytest.raises(UserError, match=r"give tune\.samples=100st or more"):
        lr.measure(bench_of(World.alone(), "Regression", "tune.samples=99st"))


@pytest.mark.parametrize("part", ["lr", "noise"])
def test_a_part_that_starts_from_weights_is_measured_again_once_they_are_others(part: str, tmp_path: Path) -> None:
    """Without init_from it starts at step 0, however far the run in the directory is trained."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    found = list[Any]()
    for step in (23, 46):
        (run / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        found += [conditions_of(bench_of(World.alone(), "Regression", *start, f"run.dir={run}"), part)
                  for start in ((f"init_from={run}",), ())]  # fmt: skip
    assert found[0] != found[2]
    assert found[1] == found[3]


def test_a_speed_is_measured_again_with_other_threads() -> None:
    bench, threads = bench_of(World.alone(), "Regression"), torch.get_num_threads()
    before = {part: conditions_of(bench, part) for part in ("speed", "memory")}
    try:
        torch.set_num_threads(threads + 1)
        assert conditions_of(bench, "speed") != before["speed"]
        assert conditions_of(bench, "memory") == before["memory"]
    finally:
        torch.set_num_threads(threads)
    assert before["speed"]["cpu"]["cores"] >= 1
    assert before["speed"]["cpu"]["model"]


def test_an_lr_that_isnt_tuned_is_said_beside_the_batch() -> None:
    noise = {"over_run": 64.0, "scale": 64.0, "low": 32.0, "high": 128.0, "norm": "raw"}
    for suggestion, much_larger in ((0.1, True), (0.01, False)):
        tested = {"suggestion": suggestion, "largest_stable": 1.0}
        given = recommended(bench_of(World.alone(), "Regression", "lr.peak=0.02"), {"noise": noise, "lr": tested})
        assert given is not None
        assert any("tune the LR first" in note for note in given["notes"]) == much_larger
        assert not any("usual starting point" in note for note in given["notes"])
    usual = recommended(bench_of(World.alone(), "Regression", "lr.peak=null"), {"noise": noise})
    assert usual is not None
    assert any("usual starting point" in note for note in usual["notes"])


def test_a_speed_whose_times_say_nothing_isnt_used_and_it_is_said() -> None:
    for spread, known in ((0.4, True), (0.6, False)):
        measured = Speed(1, (Timed(8, 1.0, 1.0, 0.0, spread),)).plain() | {"to_the_largest": True}
        noise = {"over_run": 64.0, "scale": 64.0, "low": 32.0, "high": 128.0, "norm": "raw"}
        parts, said = (
            {"speed": measured, "noise": noise},
            f"the speed isn't known here: repeated times spread by {spread:.0%}",
        )
        found = recommended(bench_of(World.alone(), "Regression"), parts)
        assert found is not None
        assert (found["step_ms"] is not None) == known
        assert any(note.startswith(said) for note in found["notes"]) != known
        assert speed.tell(measured).startswith(said) != known
        assert "run the command again on a quieter machine" in speed.tell(measured)
    with pytest.raises(UserError, match=r"tune\.max_step_ms=50, but the speed isn't known here"):
        recommended(bench_of(World.alone(), "Regression", "tune.max_step_ms=50"), parts)
