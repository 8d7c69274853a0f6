"""Time training steps whose lines go to trackers against the same steps without, taking turns.

python -m benchmarks.trackers
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import silenced
from isobatch.conf.compose import compose
from isobatch.conf.trackers import TRACKERS
from isobatch.trainers import run as training
from isobatch.trainers.ranks.session import Session, Start
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.trackers.followers import Followers
from tests.support.harness import in_ranks

STEPS, WARM, TURNS = 220, 20, 3
PER_GPU = 128
READY_S = 60.0
ALL = list(TRACKERS)


class Timed(Watch):
    """Note the time of step WARM, once each tracker is open, and of the last step."""

    def __init__(self, started: list[Followers]) -> None:
        super().__init__()
        self._started, self.times = started, dict[int, tuple[float, float]]()

    def beat(self, steps: int | None = None, samples: int | None = None) -> None:
        super().beat(steps, samples)
        if steps == WARM and WARM not in self.times:
            deadline = time.monotonic() + READY_S
            followers = [follower for one in self._started for follower in one.followers]
            while any(follower.sent is None for follower in followers) and time.monotonic() < deadline:
                time.sleep(0.1)
        if steps in (WARM, STEPS):
            self.times.setdefault(steps, (time.perf_counter(), time.process_time()))


def measure(world: World, folder: Path, to: list[str], every: int) -> tuple[float, float, float]:
    """Train, and return the seconds and CPU seconds of a step, and the CPU seconds of the trackers' processes."""
    words = ["task=custom", "task._target_=benchmarks.noise.MLP", f"batch.global_size={PER_GPU * world.size}"]
    words += [
        f"duration={STEPS}st",
        "lr.peak=0.05",
        "evaluate.every=null",
        "checkpoint.every=null",
        "check.contract=false",
    ]
    config = compose([*words, f"log.every={every}st", f"log.to=[{','.join(to)}]"])
    started: list[Followers] = []

    class Noted(Followers):
        def start(self) -> None:
            super().start()
            started.append(self)

    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TRACKIO_DIR": f"{folder}/trackio"}
    training.Followers = Noted  # type: ignore[attr-defined, misc]
    watch = Timed(started)
    run = world.agree(tempfile.mkdtemp(dir=folder) if world.rank == 0 else "")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with silenced():
        training.train(
            Session(config, Start(Path(run).name, run_dir=f"{run}/run"), world, Stop(), watch), lambda run: None
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wall_s, own_s = (end - start for start, end in zip(watch.times[WARM], watch.times[STEPS], strict=True))
    return wall_s / (STEPS - WARM), own_s / (STEPS - WARM), cpu_s


def turns(world: World, folder: Path, to: list[str], every: int) -> list[tuple[float, ...]]:
    """Return the measurements of each turn with trackers, then those without."""
    return [(*measure(world, folder, to, every), *measure(world, folder, [], every)) for _ in range(TURNS)]


def rows() -> list[dict[str, Any]]:
    """Return a row per number of processes, interval of lines, and tracker."""
    found = []
    for size, every, to in [*((1, 10, [name]) for name in TRACKERS), (1, 10, ALL), (1, 1, ALL), (2, 10, ALL)]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            measured = in_ranks(size, partial(turns, folder=folder, to=to, every=every), folder, deadline_s=600)[0]
        found.append(
            {
                "processes": size,
                "log.to": ", ".join(to) if len(to) == 1 else "all four",
                "log.every": f"{every}st",
                "with ms": 1e3 * statistics.median(row[0] for row in measured),
                "without ms": 1e3 * statistics.median(row[3] for row in measured),
                "with / without": statistics.median(row[0] / row[3] for row in measured),
                "CPU of training, with / without": statistics.median(row[1] / row[4] for row in measured),
                "CPU s of the trackers": statistics.median(row[2] for row in measured),
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
