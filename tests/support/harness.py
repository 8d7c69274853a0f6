"""Run tests on ranks forked from this process, which has imported torch, so that a start takes 0.1 s."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from isobatch.trainers.checkpoints.weights import save_final
from isobatch.trainers.data.validation import open_validation
from isobatch.trainers.engines.ddp import DDP
from isobatch.trainers.engines.deepspeed.stage0 import import_deepspeed
from isobatch.trainers.engines.engine import Engine
from isobatch.trainers.engines.reducer import Parts
from isobatch.trainers.engines.state import Average
from isobatch.trainers.loop.evaluate import Evaluator
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.optim.make import Tuned
from isobatch.trainers.ranks.session import Session, Start
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World, meeting_point
from isobatch.trainers.run import train
from isobatch.trainers.tasks.task import Task

DEADLINE_S = 60.0
# Tolerances between float32 runs that differ only in the rounding of sums. A step rounds a weight by 2^-24 of its size
# in both runs: √(2 · 30) · 2^-24 = 5e-7 after 30 steps, if nothing amplifies it. Adam amplifies it, since it divides by
# the size of a gradient. A gradient of 1/1000 of its terms' size is off by 1000 · 2^-24, and so is each of its steps;
# in 12 steps of 0.01 that is 7e-6.
ROUNDING, ADAM_ROUNDING = 1e-6, 1e-5


@cache
def preload_deepspeed(device: str = "cpu") -> None:
    """Import DeepSpeed and the modules of its first engine once, before ranks are forked. This starts no thread."""
    import_deepspeed(torch.device("cpu") if device == "cpu" else None)
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    gc.freeze()  # stage 3 collects garbage when it starts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_ranks(
    size: int, body: Callable[[World], Any], folder: Path, *, deadline_s: float = DEADLINE_S, device: str = "cpu"
) -> list[Any]:
    """Call ``body`` on ``size`` forked gloo ranks, also for a size of 1, and return its results (through JSON).

    With device="cuda" the ranks share the GPUs. This process must not have initialised CUDA, which doesn't survive a
    fork.

    An exception on a rank is returned as ``{"raised": its class, "message": its text}``, a UserError also with its
    ``key``. Ranks that still run after the deadline are killed, and the test fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    pids = [_fork(rank, size, port, body, folder, device) for rank in range(size)]
    deadline, late = time.monotonic() + deadline_s, []
    for rank, pid in enumerate(pids):
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                late.append(rank)
                break
            time.sleep(0.005)
    assert not late, f"ranks {late} of {size} hung"
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(size)]


def _fork(rank: int, size: int, port: int, body: Callable[[World], Any], folder: Path, device: str) -> int:
    if pid := os.fork():
        return pid
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        try:
            kept: list[object] = []
            store = meeting_point(DEADLINE_S / 2, kept)
            result = body(World.join(device, DEADLINE_S / 2, store, kept, backend="gloo"))
        except Exception as error:
            traceback.print_exc()
            result = {"raised": type(error).__name__, "message": str(error)}
            result |= {"key": error.key} if isinstance(error, UserError) else {}
        (folder / f"rank-{rank}.json").write_text(json.dumps(result))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)  # gloo may hang or abort in a normal exit


class Runs:
    """Train on forked ranks, with a run directory per call.

    Args:
        trial: run the trial of the task before step 1, as users do (see test_trial.py). Off by default to save time.
        device: ``cpu``, or ``cuda`` (see ``in_ranks``).
    """

    def __init__(self, folder: Path, deadline_s: float = DEADLINE_S, trial: bool = False, device: str = "cpu") -> None:
        self.folder, self.deadline_s, self.trial, self.device = folder, deadline_s, trial, device
        self.count = 0

    def __call__(
        self,
        world: int,
        *overrides: str,
        stop_at: int | None = None,
        by_rank: int = 0,
        resume: Run | None = None,
        **known: Any,
    ) -> Run:
        """Run ``overrides`` on ``world`` ranks.

        Args:
            stop_at: step, from 1, in which rank ``by_rank`` is asked to stop.
            resume: the run to resume, or None to start a new one.
            known: fields of ``Start``.
        """
        self.count += 1
        run = resume.run if resume else RunDir(self.folder / f"run-{self.count}")
        quick = [] if self.trial else ["check.contract=false"]
        config = configured(["data.workers=0", *quick, *overrides])
        if config.engine.name == "deepspeed":
            preload_deepspeed(self.device)

        def body(ranks: World) -> Any:
            stop = Stop()
            stop_after = stop_at - 1 if stop_at is not None and ranks.rank == by_rank else None
            watch = StopAfter(stop, stop_after)
            start = Start(f"attempt-{self.count}", "test", run_dir=str(run.path), **known)
            end = train(Session(config, start, ranks, stop, watch), lambda run: None)
            return {"state": end.state, "step": end.step, "samples": end.samples, "cause": end.cause}

        folder = self.folder / f"ranks-{self.count}"
        ends = in_ranks(world, body, folder, deadline_s=self.deadline_s, device=self.device)
        return Run(run, ends)


def session_of(config: RunConfig, world: World, stop: Stop | None = None, **known: Any) -> Session:
    """Return a worker's session; ``known`` are fields of its ``Start``."""
    return Session(config, Start("attempt", **known), world, stop or Stop(), Watch())


class StopAfter(Watch):
    """Ask for a stop after ``steps`` steps, like a signal at that moment."""

    def __init__(self, stop: Stop, steps: int | None) -> None:
        super().__init__()
        self._stop, self._steps = stop, steps

    def beat(self, steps: int | None = None, samples: int | None = None) -> None:
        super().beat(steps, samples)
        if self._reached and self.reached.step == self._steps:  # also in an evaluation before the loop's first step
            self._stop.wanted = "SIGTERM"


class Run:
    """The directory of a run that has ended, and the result of each rank."""

    def __init__(self, run: RunDir, ends: list[Any]) -> None:
        self.run, self.ends = run, ends

    def weights(self, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.run.final / name)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run.path / "metrics.jsonl").read_text().splitlines()]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run.path / "events.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics() if "loss" in line]

    def log(self) -> str:
        return "".join(file.read_text() for file in sorted(self.run.logs.glob("*.log")))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return max |Δ| / max |w| over all weights, to compare with ``ROUNDING``."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(w.abs().max()) for w in a.values())


def evaluator(task: Any, model: nn.Module, world: World, per_gpu: int, **more: Any) -> Evaluator:
    """Return an evaluator of ``model`` on the validation data of ``task``."""
    filled = Task(task)
    data = open_validation(filled, world, seed=0, samples=more.pop("samples", None))
    assert data
    return Evaluator(filled, model, data, world, more.pop("stream", None) or Stream(0, world.device), per_gpu, **more)


def write_final(run: RunDir, model: nn.Module, average: Average | None) -> None:
    """Write ``final/`` as a run of this model does at its end."""
    parts = Parts(model, World.alone(), lambda: Tuned(torch.optim.SGD(model.parameters()), [1.0], [False]))
    task: Any = None
    engine = Engine(task, parts, DDP(parts, {}))
    engine.average = engine._state.average = average
    save_final(run, engine, writes=True)
