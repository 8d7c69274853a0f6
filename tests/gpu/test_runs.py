"""Test that a GPU trains the same run as the CPU, on every engine, with every feature, and after every stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isobatch.trainers.tensors.manifest import read
from isobatch.trainers.tensors.names import checkpoints, step_of
from isobatch.trainers.tensors.slices import Reader
from tests.gpu import needs
from tests.ranks.test_bitwise import BITWISE, assert_same, bits
from tests.support.harness import Run, Runs, distance
from tests.support.same import CASES, ENGINES, overrides

PLAIN = "SGD, dropout, augmentation, unequal units, uneven cuts, clipping"
# A GPU rounds exp, tanh and erf by some units in the last place, a CPU by one, so the distance between the two may be
# ten times that between two cuts.
DEVICES = 10
CLASSES = (
    "task=custom", "task._target_=tests.gpu.tasks.Classes", "batch.global_size=64", "duration=12st", "lr.peak=0.05",
    "evaluate.every=null", "log.every=1st",
)  # fmt: skip


def finished(run: Run) -> Run:
    assert run.ends[0].get("state") == "finished", run.ends[0]
    return run


def same_bits(one: Run, other: Run) -> bool:
    weights, others = one.weights(), other.weights()
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("engine", [needs.engine(name) for name in ENGINES])
def test_every_engine_trains_the_run_of_the_cpu(runs: Runs, cpu_runs: Runs, engine: str) -> None:
    on_gpu, on_cpu = finished(runs(1, *overrides(PLAIN, engine))), finished(cpu_runs(1, *overrides(PLAIN, "DDP")))
    assert distance(on_gpu.weights(), on_cpu.weights()) < DEVICES * CASES[PLAIN].apart
    losses, expected = on_gpu.losses(), on_cpu.losses()
    assert losses == pytest.approx(expected, rel=1e-4), "each loss belongs to its step, although it is read one late"


@pytest.mark.parametrize("case", [case for case in CASES if case != PLAIN])
def test_every_case_is_the_run_of_the_cpu(runs: Runs, cpu_runs: Runs, case: str) -> None:
    on_gpu, on_cpu = finished(runs(1, *overrides(case, "DDP"))), finished(cpu_runs(1, *overrides(case, "DDP")))
    rough = CASES[case].apart > 1e-4  # bf16, also in Muon: its weights may be far apart after a few steps
    losses, expected = ([loss or 0.0 for loss in run.losses()] for run in (on_gpu, on_cpu))  # None: skipped
    assert losses == pytest.approx(expected, rel=0.02 if rough else 1e-4)
    assert rough or distance(on_gpu.weights(), on_cpu.weights()) < DEVICES * CASES[case].apart


@needs.newer_torch
@pytest.mark.parametrize("engine", [needs.engine(name) for name in ("DDP", "FSDP", "Accelerate")])
def test_two_ranks_that_share_a_gpu_train_what_one_does(runs: Runs, engine: str) -> None:
    """NCCL allows one rank per GPU, so they exchange tensors over gloo."""
    one, two = finished(runs(1, *overrides(PLAIN, engine))), finished(runs(2, *overrides(PLAIN, engine)))
    assert distance(one.weights(), two.weights()) < CASES[PLAIN].apart


@pytest.mark.cuda
@pytest.mark.parametrize("engine", [needs.engine(name) for name in ("FSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")])
def test_offloaded_state_changes_nothing(runs: Runs, engine: str) -> None:
    kept, offloaded = (
        finished(runs(1, *overrides("AdamW", engine), f"engine.offload={offload}")) for offload in ("false", "true")
    )
    assert distance(kept.weights(), offloaded.weights()) < DEVICES * CASES["AdamW"].apart


@pytest.mark.parametrize("engine", [needs.engine(name) for name in ("DDP", "FSDP", "ZeRO-1")])
def test_a_resumed_run_is_bitwise_equal(runs: Runs, engine: str) -> None:
    whole, stopped = finished(runs(1, *overrides("AdamW", engine))), runs(1, *overrides("AdamW", engine), stop_at=5)
    assert stopped.ends[0]["state"] == "stopped"
    assert same_bits(finished(runs(1, *overrides("AdamW", engine), resume=stopped)), whole)


def test_a_run_moves_between_gpu_and_cpu(runs: Runs, cpu_runs: Runs) -> None:
    command = (*overrides("AdamW", "DDP"), "ema=60sa")
    whole, moved = finished(cpu_runs(1, *command)), runs(1, *command, stop_at=4)
    moved = cpu_runs(1, *command, stop_at=8, resume=moved)
    moved = finished(runs(1, *command, resume=moved))
    assert distance(moved.weights(), whole.weights()) < DEVICES * CASES["AdamW"].apart
    averages = moved.weights("ema.safetensors"), whole.weights("ema.safetensors")
    assert distance(*averages) < DEVICES * CASES["AdamW"].apart


@needs.newer_torch
def test_bitwise_runs_are_equal_twice_and_on_two_ranks(runs: Runs) -> None:
    command = (*BITWISE, "clip_norm=0.5", "noise.every=1st")
    one = finished(runs(1, *command))
    assert_same(one, runs(1, *command))
    assert_same(one, runs(2, *command))


def test_workers_and_pinned_memory_change_nothing(runs: Runs) -> None:
    plain, ahead = (finished(runs(1, *overrides(PLAIN, "DDP"), f"data.workers={workers}")) for workers in (0, 2))
    assert same_bits(plain, ahead)


def test_a_checkpoint_holds_its_step_while_training_goes_on(runs: Runs) -> None:
    """It is written in the background, while later steps change the weights."""
    command = (*CLASSES, "task.args.width=1024", "optimizer=adamw", "lr.peak=0.001")
    stopped = runs(1, *command, stop_at=6)
    running = finished(runs(1, *command, "checkpoint.every=1st", "checkpoint.keep=99"))
    assert _tensors(running, 6) == _tensors(stopped, 6)


def _tensors(run: Run, step: int) -> dict[str, bytes]:
    path = next(path for path in checkpoints(run.run) if step_of(path) == step)
    checkpoint = read(path)
    reader = Reader(checkpoint)
    return {name: bits(reader.whole(name)) for name in checkpoint.tensors}


def test_noise_is_that_of_the_cpu(runs: Runs, cpu_runs: Runs) -> None:
    command = (*overrides(PLAIN, "DDP"), "noise.every=1st")
    on_gpu, on_cpu = finished(runs(1, *command)).metrics(), finished(cpu_runs(1, *command)).metrics()
    for line, expected in zip(on_gpu, on_cpu, strict=True):
        for name in {"noise/grad_sq", "noise/trace"} & expected.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-3)
    assert "noise/trace" in on_cpu[0]


def test_compiled_model_is_the_same_run(runs: Runs) -> None:
    """Compiled code draws the same dropout masks, and fuses operations, which changes their rounding."""
    eager, compiled = finished(runs(1, *CLASSES)), finished(runs(1, *CLASSES, "compile=true"))
    assert distance(eager.weights(), compiled.weights()) < DEVICES * 1e-6


def test_fp16_resumes_with_its_loss_scale(runs: Runs, device: str) -> None:
    command = (*CLASSES, f"precision={'fp16' if device == 'cuda' else 'bf16'}")
    whole, stopped = finished(runs(1, *command)), runs(1, *command, stop_at=5)
    assert same_bits(finished(runs(1, *command, resume=stopped)), whole)
    assert whole.losses()[-1] < whole.losses()[0]
    if device == "cuda":
        assert "precision/loss_scale" in read(checkpoints(whole.run)[0]).tensors


@pytest.mark.cuda
def test_fp16_skips_a_step_that_overflows(runs: Runs) -> None:
    """A sample's gradient is up to 1000 / 64 times the loss scale, and fp16 ends at 65,504."""
    run = finished(runs(1, *CLASSES, "task._target_=tests.gpu.tasks.Steep", "precision=fp16", "lr.peak=1e-5"))
    scale: Any = Reader(read(checkpoints(run.run)[0])).whole("precision/loss_scale")
    assert float(scale[0]) < 2.0**16
    assert [event for event in run.events() if event["event"] == "skip"]


def test_metrics_of_the_hardware(runs: Runs) -> None:
    run = finished(runs(1, *CLASSES, "log.peak_tflops=100"))
    for line in run.metrics():
        assert line["memory_gb"] > 0
        assert 0 <= line["mfu"] < 1
