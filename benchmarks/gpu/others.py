"""Time optimizers alone, whole commands, and the frameworks that people use instead."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import optimizers
from benchmarks.gpu.models import Text
from benchmarks.gpu.step import BARE, DDP, OURS, TINY_TEXT
from benchmarks.gpu.turns import Bench, Measured, Turn, Work, table, take_turns
from benchmarks.peers.compare import PEERS, train
from benchmarks.peers.work import Job
from benchmarks.plain import PER_GPU, Yardstick
from benchmarks.start import LAUNCH, TASK, seconds
from benchmarks.step import synchronize
from benchmarks.tables import Rows

OPTIMIZERS = ("AdamW, fused", "LAMB, ours", "SGD, fused", "LARS, ours")


def steps_alone(bench: Bench) -> Iterator[Rows]:
    """Yield a row per optimizer, on the parameters of the GPT-2."""
    model = Text(**(TINY_TEXT if bench.dry else {})).model().to(bench.device)
    parameters: Any = list(model.parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    made, steps = optimizers.makers(), bench.steps(20)

    def turn(optimizer: torch.optim.Optimizer) -> float:
        synchronize(bench.device)
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        synchronize(bench.device)
        return time.perf_counter() - began

    makers: dict[str, Callable[[], Turn]] = {
        name: lambda name=name: partial(turn, made[name][1](optimizers.groups(parameters)))  # type: ignore[misc]
        for name in OPTIMIZERS
    }
    for measured in take_turns(bench, makers, rounds=15):
        yield table(measured, steps, ("AdamW, fused", "SGD, fused"))


def starts(bench: Bench) -> Iterator[Rows]:
    """Yield the seconds from start to exit of two steps."""
    overrides = (
        f"device={bench.device.type}", "cluster.gpus_per_node=1", f"batch.global_size={PER_GPU}", "duration=2st",
        "clip_norm=1.0", "run.new=true", "evaluate.every=null",
    )  # fmt: skip
    by_hand = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "benchmarks.gpu.by_hand"]
    torchrun = "torchrun by_hand.py"
    commands = {"launch.py": [*LAUNCH, *TASK, *overrides], torchrun: [*by_hand, "--steps", "2"]}
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Turn]] = {
            name: lambda command=command: partial(seconds, command, folder, [])  # type: ignore[misc]
            for name, command in commands.items()
        }
        for measured in take_turns(bench, makers, rounds=4):
            yield [
                {"": row[""], "s": row["ms per step"] / 1e3, "ratio": row[f"/ {torchrun}"], "turns": row["turns"]}
                for row in table(measured, 1, (torchrun,))
            ]


def frameworks(bench: Bench) -> Iterator[Rows]:
    """Yield a row per framework on the MLP of plain.py. A framework that fails or isn't installed has the reason."""
    bench.world.connect()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    steps = bench.steps(150)
    work = Work(Yardstick, {}, PER_GPU, steps, "sgd", bf16=False, compiled=False)
    makers: dict[str, Callable[[], Turn]] = {
        OURS: partial(work.ours, bench), BARE: partial(work.plain, bench, False), DDP: partial(work.plain, bench, True)
    }  # fmt: skip
    missing: dict[str, Measured] = {}
    for peer in PEERS:
        try:
            job = Job(Yardstick(), steps + 1, PER_GPU, best=peer.best, cpu=bench.device.type == "cpu")
            of_peer(peer, job)
            makers[peer.name] = lambda peer=peer, job=job: partial(of_peer, peer, job)  # type: ignore[misc]
        except Exception as error:
            missing[peer.title.replace(" {}", "")] = Measured([], missing=repr(error).replace("|", "/"))
    for measured in take_turns(bench, makers, rounds=5):
        yield table(measured | missing, steps, (BARE, DDP))


def of_peer(peer: Any, job: Job) -> float:
    """Return the seconds of all steps except the first."""
    ends = train(peer, job)
    return ends[-1] - ends[0]
