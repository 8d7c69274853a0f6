"""Test the moving average of weights, final/, and the weights that a run starts from."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from isobatch.conf.compose import compose
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.checkpoints.weights import find, initialise, load_average
from isobatch.trainers.engines.state import Average
from isobatch.trainers.ranks.failure import RunFailed
from isobatch.trainers.ranks.world import World
from tests.ranks.test_parts import ALONE
from tests.support.disks import mounted
from tests.support.harness import ROUNDING, Run, Runs, distance, in_ranks, write_final
from tests.support.tasks import Counted

TASK = ("task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=20", "lr.peak=0.05")


# ---- the average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_average_equals_a_float64_reference(dtype: torch.dtype) -> None:
    """This includes bfloat16 weights, whose steps of 2^-8 would swallow one update."""
    weight = nn.Parameter(torch.randn(50, 4).to(dtype))
    average, expected = Average({"w": weight}), weight.detach().double().clone()
    for _ in range(300):
        with torch.no_grad():
            weight.add_(0.05 * torch.randn_like(weight))
        average.update(0.99)
        expected = 0.99 * expected + 0.01 * weight.detach().double()
    assert (average.tensors["w"].double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("global_size", [16, 64, 256])
def test_average_forgets_by_samples(global_size: int) -> None:
    """Weights jump from 0 to 1 at the start. After n samples, 0.5^(n / half-life) of the difference remains."""
    plan = resolve(compose([*TASK, "ema=2000sa", f"batch.global_size={global_size}", "duration=5120sa"]), 1, 500)
    weight = nn.Parameter(torch.zeros(3))
    average, sample = Average({"w": weight}), 0
    nn.init.ones_(weight)
    while step := plan.step_at(sample):
        assert step.recipe.ema is not None
        average.update(step.recipe.ema)
        sample = step.stop
        if sample in (1024, 4096, 5120):
            assert average.tensors["w"].tolist() == pytest.approx([1 - 0.5 ** (sample / 2000)] * 3, rel=1e-5)
    assert sample == 5120


def test_swapping_the_average_restores_the_weights() -> None:
    """They are bitwise equal, with NaNs, negative zeros and rounded dtypes, and after an exception."""
    odd = torch.tensor([1.1, -0.0, float("nan"), float("inf"), 1e-42])
    odd.view(torch.int32)[2] += 77  # a NaN with a payload
    weights = {"a": nn.Parameter(odd.clone()), "b": nn.Parameter(odd.bfloat16()), "c": nn.Parameter(torch.tensor(3.0))}
    average = Average(weights)
    with torch.no_grad():
        weights["c"].fill_(5.0)
    average.update(0.5)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    kept = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with average.swapped():
        assert weights["c"].item() == 4.0
        assert weights["b"].dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    for name, weight in weights.items():
        assert same_bits(weight, before[name])
        assert same_bits(average.tensors[name], kept[name])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def test_average_of_a_run_follows_the_formula(runs: Runs) -> None:
    """Checkpoints of every step hold the weights to average."""
    run = runs(2, *TASK, "duration=12st", "ema=50sa", "checkpoint.every=1st", "checkpoint.keep=20")
    expected: dict[str, Tensor] = {}
    for step in range(13):
        model = Counted().model()
        if step:
            initialise(model, str(run.run.checkpoints / f"step-{step:08d}"), ALONE)
        else:
            torch.manual_seed(0)
            model = Counted().model()
        for name, weight in model.state_dict().items():
            decay = 0.5 ** (20 / 50) if step else 0.0
            expected[name] = decay * expected.get(name, torch.zeros(())) + (1 - decay) * weight.double()
    found = load_file(run.run.final / "ema.safetensors")
    assert distance({name: tensor.double() for name, tensor in found.items()}, expected) < ROUNDING
    assert distance(found, run.weights()) > 1e-3


# ---- final/


class Shared(nn.Module):
    """A model with everything in a state_dict that isn't simply a separate tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Linear(6, 4, bias=False)
        self.turned.weight = nn.Parameter(self.embed.weight.detach().T)  # other strides, the same memory
        self.part = nn.Parameter(torch.randn(10)[3:7])
        self.narrow = nn.Parameter(torch.randn(3, 3).bfloat16())
        self.image = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.norm = nn.BatchNorm1d(4)
        self.norm.num_batches_tracked += 1 + seed
        self.register_buffer("mask", torch.rand(5) < 0.5)
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    expected = b.state_dict()
    return all(same_bits(tensor, expected[name]) for name, tensor in a.state_dict().items())


def test_final_holds_every_tensor_once_and_loads_as_plain_torch(tmp_path: Path) -> None:
    run, model = RunDir(tmp_path), Shared()
    average = Average(dict(model.named_parameters()))
    nn.init.constant_(model.part, 7.0)
    write_final(run, model, average)
    file = run.final / "model.safetensors"
    assert sorted(path.name for path in run.final.iterdir()) == ["ema.safetensors", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert not {"head.weight", "turned.weight", "scratch"} & load_file(file).keys()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "final").stat().st_mode) & 0o666
    for name, expected in (("model", model), ("ema", Shared())):
        again = Shared(seed=1)
        loaded = again.load_state_dict(load_file(run.final / f"{name}.safetensors"), strict=False)
        assert (loaded.missing_keys, loaded.unexpected_keys) == (["head.weight", "turned.weight"], [])
        assert same_state(again, expected)


def test_safetensors_own_function_loads_a_model_with_tied_weights(tmp_path: Path) -> None:
    model, again = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)) for _ in range(2))
    for tied in (model, again):
        tied[2].weight = tied[0].weight
    write_final(RunDir(tmp_path), model, None)
    load_model(again, tmp_path / "final" / "model.safetensors")
    assert same_state(again, model)


def test_final_replaces_an_older_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for left in (".final.tmp", ".final.old", "final"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "ema.safetensors").write_bytes(b"older")
    write_final(run, Shared(), None)
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "model.safetensors"]


@pytest.mark.parametrize("exists", [True, False], ids=["a folder", "nothing yet"])
def test_final_may_be_a_link_to_another_disk(tmp_path: Path, exists: bool) -> None:
    """The link stays, however often the run is extended. An earlier version left it as .final.old."""
    run, disk = RunDir(tmp_path / "run"), tmp_path / "disk"
    run.path.mkdir()
    run.final.symlink_to("../disk")
    (run.path / ".final.old").symlink_to("../disk")
    if exists:
        disk.mkdir()
        (disk / "mine").write_text("")
    for seed in range(3):
        model, again = Shared(seed), Shared(seed=9)
        write_final(run, model, None)
        assert [path.name for path in run.path.iterdir()] == ["final"]
        assert run.final.readlink() == Path("../disk")
        assert sorted(path.name for path in disk.iterdir()) == ["mine"] * exists + ["model.safetensors"]
        again.load_state_dict(load_file(disk / "model.safetensors"), strict=False)
        assert same_state(again, model)


def test_final_may_be_a_mount(tmp_path: Path) -> None:
    """A mount can't be renamed, and its neighbour is on another disk."""
    run = RunDir(tmp_path)
    run.final.mkdir()
    with mounted(run.final):
        for _ in range(2):
            write_final(run, Shared(), None)
        assert [path.name for path in run.final.iterdir()] == ["model.safetensors"]


def test_final_on_a_missing_disk_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.final.symlink_to(tmp_path / "gone/final")
    with pytest.raises(RunFailed, match="gone/final"):
        write_final(run, Shared(), None)
    assert run.final.is_symlink()
    assert not (tmp_path / "gone").exists()


# ---- init_from


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a finished run on two ranks with checkpoints of steps 10, 20 and 30. The best is that of step 10."""
    overrides = ("duration=30st", "ema=100sa", "checkpoint.every=10st", "checkpoint.keep=5")
    run = Runs(tmp_path_factory.mktemp("trained"))(2, *TASK, *overrides)
    (run.run.checkpoints / "best").symlink_to("step-00000010")
    return run


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    shutil.copytree(trained.run.path, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def weights_from(source: Path) -> tuple[dict[str, Tensor], Path]:
    model = Counted().model()
    return model.state_dict(), Path(initialise(model, str(source), ALONE))


def test_init_from_takes_a_run_its_final_or_a_file(trained: Run) -> None:
    path, expected = trained.run.path, trained.weights()
    file = path / "final" / "model.safetensors"
    for source in (path, path / "final", file):
        found, resolved = weights_from(source)
        assert resolved == file
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(weights_from(path / "final/ema.safetensors")[0]["0.weight"], averaged(trained)["0.weight"])


def averaged(run: Run) -> dict[str, Tensor]:
    return load_file(run.run.final / "ema.safetensors")


def test_init_from_takes_a_checkpoint_or_the_best(trained: Run) -> None:
    at = {step: weights_from(trained.run.checkpoints / f"step-{step:08d}") for step in (10, 20, 30)}
    assert at[10][1].name == "step-00000010"
    assert distance(at[30][0], trained.weights()) == 0
    assert distance(at[10][0], at[20][0]) > 0
    best, path = weights_from(trained.run.checkpoints / "best")
    assert (distance(best, at[10][0]), path) == (0, at[10][1])


def test_init_from_an_unfinished_run_uses_its_newest_valid_checkpoint(copied: Path) -> None:
    shutil.rmtree(copied / "final")
    assert weights_from(copied)[1].name == "step-00000030"
    file = copied / "checkpoints/step-00000030/rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found, path = weights_from(copied)
    assert path.name == "step-00000020"
    assert distance(found, weights_from(path)[0]) == 0
    for step in (10, 20):
        (copied / f"checkpoints/step-{step:08d}/rank-00000.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no good weights: step-00000030: rank-00001.*sha256.*step-00000010: rank-00000"
    ):
        weights_from(copied)


def test_the_average_is_found_beside_the_weights(trained: Run, copied: Path) -> None:
    model = Counted().model()
    assert load_average(model, str(find(str(trained.run.path))), ALONE)
    assert distance(model.state_dict(), averaged(trained)) == 0
    assert load_average(model, str(find(str(trained.run.checkpoints / "step-00000030"))), ALONE)
    assert distance(model.state_dict(), averaged(trained)) == 0
    (copied / "final/ema.safetensors").unlink()
    assert not load_average(model, str(find(str(copied))), ALONE)
    assert not load_average(model, str(trained.run.final / "ema.safetensors"), ALONE)


OTHER_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "doesn't exist; give a run directory, a checkpoint, or a .safetensors file"),
    "empty": (lambda path: path.mkdir(), "has no weights; give a run"),
    "model.pt": (lambda path: torch.save({"w": torch.ones(1)}, path), "isn't a .safetensors file; give a run"),
    "pickle.safetensors": (lambda path: torch.save({"w": torch.ones(1)}, path), "can't be read as safetensors"),
    "short.safetensors": (lambda path: path.write_bytes(b"\x08"), "can't be read as safetensors"),
}


@pytest.mark.parametrize("name", OTHER_SOURCES)
def test_invalid_sources_are_rejected(tmp_path: Path, name: str) -> None:
    make, message = OTHER_SOURCES[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"init_from=.*{name}.*{message}"):
        weights_from(tmp_path / name)


PLAIN = Counted().model().state_dict()
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"0.bias": None}, "doesn't fit the model: it lacks 0.bias$"),
    "unexpected": ({"9.bias": torch.ones(1)}, "it has unexpected tensors: 9.bias$"),
    "shape": ({"0.weight": torch.ones(16, 8)}, r"it has other shapes: 0.weight \[16, 8\], not \[32, 8\]$"),
    "dtype": ({"0.bias": torch.ones(32).int()}, "it has other dtypes: 0.bias torch.int32, not torch.float32$"),
    "many": (
        {"0.bias": None, **{f"m.{i}": torch.ones(1) for i in range(9)}},
        "it lacks 0.bias; it has unexpected tensors: m.0, m.1, m.2, m.3, m.4, and 4 more$",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_mismatches_are_listed_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    changes, message = MISFITS[name]
    save_file({k: v for k, v in {**PLAIN, **changes}.items() if v is not None}, tmp_path / "other.safetensors")
    model = Counted().model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message.replace("$", "; init_from loads only weights: .*")):
        initialise(model, str(tmp_path / "other.safetensors"), ALONE)
    assert distance(model.state_dict(), before) == 0


def test_mismatches_of_a_checkpoint_are_listed(trained: Run) -> None:
    with pytest.raises(
        UserError, match=r"lacks 5.weight, 5.bias; it has other shapes: 0.weight \[32, 8\], not \[64, 8\]"
    ):
        initialise(nn.Sequential(*Counted(width=64).model(), nn.Linear(2, 2)), str(trained.run.path), ALONE)


def test_floats_are_converted(tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in PLAIN.items()}, tmp_path / "half.safetensors")
    found = weights_from(tmp_path / "half.safetensors")[0]
    assert found["0.weight"].dtype == torch.float32
    assert torch.equal(found["0.weight"], PLAIN["0.weight"].bfloat16().float())


def test_one_name_of_shared_tensors_is_enough(tmp_path: Path) -> None:
    file, model = tmp_path / "tied.safetensors", Shared()
    write_final(RunDir(tmp_path), model, None)
    plain = load_file(tmp_path / "final" / "model.safetensors")
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        save_file({**plain, **{name: plain["embed.weight"].clone() for name in names}}, file)
        if "embed.weight" not in names:
            save_file({name: tensor for name, tensor in load_file(file).items() if name != "embed.weight"}, file)
        again = Shared(seed=1)
        initialise(again, str(file), ALONE)
        assert same_state(again, model)
        assert again.head.weight is again.embed.weight
        assert again.scratch.tolist() == [1, 1]
    save_file({**plain, "head.weight": plain["embed.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"different values for shared tensors: embed.weight/head.weight/turned.weight"):
        initialise(Shared(seed=1), str(file), ALONE)


class Remembering(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}


def test_entries_that_are_not_tensors_are_left_out(tmp_path: Path) -> None:
    model, again = nn.Linear(2, 2), Remembering(2, 2)
    write_final(RunDir(tmp_path), model, None)
    initialise(again, str(tmp_path), ALONE)
    assert torch.equal(model.weight, again.weight)


def test_only_rank_0_reads_the_file(tmp_path: Path) -> None:
    """Other ranks don't need access to the file. The tensors have various dtypes."""
    write_final(RunDir(tmp_path), Shared(), None)

    def body(world: World) -> Any:
        model = Shared(seed=world.rank + 1)
        source = tmp_path if world.rank == 0 else tmp_path / "elsewhere"
        found = initialise(model, str(source), world)
        return same_state(model, Shared()), found, load_average(model, found, world)

    file = str(tmp_path / "final" / "model.safetensors")
    assert in_ranks(3, body, tmp_path / "ranks") == [[True, file, False]] * 3


def test_rejection_by_rank_0_reaches_all_ranks(tmp_path: Path) -> None:
    def body(world: World) -> Any:
        return initialise(Shared(), str(tmp_path / "nothing"), world)

    ends = in_ranks(2, body, tmp_path / "ranks")
    assert [end["raised"] for end in ends] == ["UserError"] * 2
    assert "nothing doesn't exist" in ends[1]["message"]


def test_run_starts_from_the_weights_of_another(runs: Runs, trained: Run) -> None:
    """Its first step and its average start from these weights, and it records their source."""
    run = runs(2, *TASK, f"init_from={trained.run.path}", "duration=1st", "lr.peak=1e-9", "lr.warmup=0", "ema=1ep")
    assert 0 < distance(run.weights(), trained.weights()) < ROUNDING
    assert distance(averaged(run), trained.weights()) < ROUNDING
    events = [json.loads(line) for line in (run.run.path / "events.jsonl").read_text().splitlines()]
    sources = [event["source"] for event in events if event["event"] == "initialised"]
    assert sources == [str(trained.run.final / "model.safetensors")]
