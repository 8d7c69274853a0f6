"""Compare Isobatch with other frameworks on the same work: time, difference over cuts, and losses on resume.

python -m benchmarks peers
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors.numpy import load_file

from benchmarks.peers.work import GLOBAL, SEEN, Job, Tokens, weights
from benchmarks.plain import PER_GPU, Yardstick, loop
from benchmarks.start import BIN, PLAIN_TWO_STEPS, TORCHRUN, TWO_STEPS, seconds
from benchmarks.step import ours
from benchmarks.tables import silenced
from isobatch.trainers.ranks.world import World
from tests.support.harness import Runs, in_ranks

STEPS, WARM, TURNS, START_TURNS = 150, 20, 5, 2
CUT_STEPS = 20
CUTS = ((1, 96, 1), (2, 16, 3), (3, 32, 1))  # world × per-GPU × accumulation, compared with the first
UNEVEN = (3, 7, 5)
BEFORE, AFTER = (2, 16, 3), (3, 16, 2)  # the cut of the stopped run, and of the resumed one
STOP_AT, LAST = 5, Tokens.SAMPLES // GLOBAL  # steps: in the middle and at the end of an epoch

PLAIN, OURS = "plain.py", "ours"
TIMED = ("1 process: ms per step", "2 processes: ms per step", "two steps on 2, start to exit: s")
MEASURED = (*("Δ, " + " × ".join(map(str, cut)) for cut in (*CUTS[1:], UNEVEN)), "lost / repeated")


class Peer(NamedTuple):
    """A row of the table: a framework, its script and its launcher.

    Attributes:
        title: title of the row, optionally with ``{}`` for the version of ``package``.
        best: use the best opt-in features.
    """

    title: str
    package: str
    module: str
    best: bool
    launcher: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.title.format(version(self.package))


TORCHRUN_2 = (TORCHRUN, "--nproc-per-node=2")
ACCELERATE_2 = (str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2")
PEERS = (
    Peer("Accelerate {}", "accelerate", "with_accelerate", False, ACCELERATE_2),
    Peer("… its recipe for unequal samples, a seedable sampler", "accelerate", "with_accelerate", True, ACCELERATE_2),
    Peer("transformers {}'s Trainer", "transformers", "with_transformers", False, TORCHRUN_2),
    Peer("… the loss takes `num_items_in_batch`", "transformers", "with_transformers", True, TORCHRUN_2),
    Peer("Lightning {}", "lightning", "with_lightning", False, TORCHRUN_2),
    Peer("… manual optimization, a custom sampler and loader", "lightning", "with_lightning", True, TORCHRUN_2),
)


def train(peer: Peer, job: Job) -> list[float]:
    """Train, and return the time at the end of each step."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # as under torchrun; otherwise Lightning unsets WORLD_SIZE at its end
    ends: list[float] = importlib.import_module(f"benchmarks.peers.{peer.module}").train(job)
    return ends


def on_ranks(world: int, body: Callable[[World], Any], folder: Path, deadline_s: float) -> list[Any]:
    """Call ``body`` on ``world`` forked ranks and return its results.

    Raises:
        RuntimeError: ``body`` failed on a rank.
    """
    with silenced():
        results = in_ranks(world, body, folder, deadline_s=deadline_s)
    for rank, result in enumerate(results):
        if isinstance(result, dict) and "raised" in result:
            raise RuntimeError(f"rank {rank} of {world}: {result['raised']}: {result['message']}")
    return results


def ms_of_steps(world: int) -> dict[str, list[float]]:
    """Return milliseconds per step in each turn, by row, measured in the same ``world`` ranks."""

    def turns(ranks: World) -> dict[str, list[float]]:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method="env://")
        ways: dict[str, Callable[[int], float]] = {
            PLAIN: lambda steps: _per_step(steps, [time.perf_counter() for _ in loop(steps)]),
            OURS: lambda steps: 1e3 * ours(ranks, steps) / steps,
        }
        for peer in PEERS:
            ways[peer.name] = lambda steps, peer=peer: _per_step(  # type: ignore[misc]
                steps, train(peer, Job(Yardstick(), steps, PER_GPU, best=peer.best))
            )
        for way in ways.values():
            way(WARM)
        measured = [{name: way(STEPS) for name, way in ways.items()} for _ in range(TURNS)]
        return {name: [turn[name] for turn in measured] for name in ways}

    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[float]] = on_ranks(world, turns, Path(folder), 600)[0]
    return found


def _per_step(steps: int, ends: list[float]) -> float:
    """Return milliseconds per step, without the set-up and the first step."""
    assert len(ends) == steps
    return 1e3 * (ends[-1] - ends[0]) / (len(ends) - 1)


def s_of_starts() -> dict[str, list[float]]:
    """Return seconds from start to exit of two steps on two ranks in each turn, by row."""
    commands = {PLAIN: PLAIN_TWO_STEPS, OURS: TWO_STEPS}
    for peer in PEERS:
        if not peer.best:
            commands[peer.name] = [*peer.launcher, "-m", f"benchmarks.peers.{peer.module}", "--steps", "2"]
    with tempfile.TemporaryDirectory() as folder:
        measured = [
            {name: seconds(command, folder, []) for name, command in commands.items()} for _ in range(START_TURNS)
        ]
    return {name: [turn[name] for turn in measured] for name in commands}


def differences(peer: Peer | None) -> list[float]:
    """Return max |Δ| / max |w| of the weights after ``CUT_STEPS`` for each further cut, against the first cut."""
    found = []
    for world, per_gpu, accumulation in (*CUTS, UNEVEN) if peer is None else CUTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if peer is None:
                with silenced():
                    run = Runs(folder)(world, *overrides(per_gpu, CUT_STEPS)).run
                found.append(load_file(run.final / "model.safetensors"))
            else:
                job = Job(Tokens(), CUT_STEPS, per_gpu, accumulation, peer.best, folder)
                on_ranks(world, lambda _, job=job: train(peer, job), folder / "ranks", 120)  # type: ignore[misc]
                found.append(load_file(weights(folder)))
    first, *others = found
    largest = max(abs(tensor).max() for tensor in first.values())
    return [float(max(abs(other[name] - first[name]).max() for name in first) / largest) for other in others]


def overrides(per_gpu: int, steps: int) -> tuple[str, ...]:
    """Return the overrides with which Isobatch does the same work."""
    return (
        "task=custom", "task._target_=benchmarks.peers.work.Tokens", f"batch.global_size={GLOBAL}",
        f"batch.per_gpu={per_gpu}", f"duration={steps}st", "lr.peak=0.05", "lr.warmup=0", "lr.decay=linear",
        "optimizer.weight_decay=0", "clip_norm=1.0", "evaluate.every=null",
    )  # fmt: skip


def lost_and_repeated(peer: Peer | None) -> tuple[int, int]:
    """Return the samples of an epoch that were never trained on, and the number of repeated uses of samples.

    The run is stopped in mid-epoch on 2 ranks, with a checkpoint, and resumed on 3.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, seen = Path(name), Path(name) / "seen"
        seen.mkdir()
        os.environ[SEEN] = str(seen)
        try:
            if peer is None:
                with silenced():
                    runs = Runs(folder)
                    stopped = runs(BEFORE[0], *overrides(BEFORE[1], LAST), stop_at=STOP_AT)
                    runs(AFTER[0], *overrides(AFTER[1], LAST), resume=stopped)
            else:
                for (world, per_gpu, accumulation), stop_at in ((BEFORE, STOP_AT), (AFTER, None)):
                    job = Job(Tokens(), LAST, per_gpu, accumulation, peer.best, folder, stop_at, resume=stop_at is None)
                    on_ranks(world, lambda _, job=job: train(peer, job), folder / "ranks", 120)  # type: ignore[misc]
        finally:
            del os.environ[SEEN]
        counted = Counter(line for file in seen.iterdir() for line in file.read_text().split())
    return Tokens.SAMPLES - len(counted), sum(counted.values()) - len(counted)


def rows() -> list[dict[str, Any]]:
    """Return a row for the hand-written loop, one for Isobatch, and two per framework: default and best features."""
    for peer in PEERS:
        importlib.import_module(f"benchmarks.peers.{peer.module}")  # once, before forking
    steps, starts = [ms_of_steps(1), ms_of_steps(2)], s_of_starts()
    table = [timed(PLAIN, steps, starts) | dict.fromkeys(MEASURED, "")]
    for way in (None, *PEERS):
        name = way.name if way else OURS
        deltas, (lost, repeated) = differences(way), lost_and_repeated(way)
        cells: list[Any] = [*deltas, *["can't"] * (len(CUTS) - len(deltas)), f"{lost} / {repeated}"]
        table.append(timed(name, steps, starts) | dict(zip(MEASURED, cells, strict=True)))
    return table


def timed(name: str, steps: list[dict[str, list[float]]], starts: dict[str, list[float]]) -> dict[str, Any]:
    """Return the times of a row: medians, and in brackets the medians of the ratios to the hand-written loop."""
    cells: dict[str, Any] = {"": name}
    for column, turns in zip(TIMED, (*steps, starts), strict=True):
        if name in turns:
            ratio = statistics.median(one / other for one, other in zip(turns[name], turns[PLAIN], strict=True))
            cells[column] = f"{statistics.median(turns[name]):.3g} ({ratio:.2f})"
        else:
            cells[column] = "as above"  # the same command
    return cells


if __name__ == "__main__":
    print(json.dumps(rows(), indent=1))
