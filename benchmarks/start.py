"""Time whole commands from start to exit, taking turns with the commands they are compared to."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYTHON, TORCHRUN = sys.executable, str(BIN / "torchrun")
LAUNCH = [PYTHON, str(ROOT / "launch.py")]
TASK = ["task=custom", "task._target_=benchmarks.plain.Yardstick", "task.train_samples=4096", "lr.peak=0.05"]

TWO_STEPS = [
    *LAUNCH, *TASK, "device=cpu", "cluster.gpus_per_node=2", "batch.global_size=64", "duration=2st", "clip_norm=1.0",
    "run.new=true", "evaluate.every=null",
]  # fmt: skip
PLAIN_TWO_STEPS = [TORCHRUN, "--nproc-per-node=2", "-m", "benchmarks.plain", "--steps", "2"]
PLAN = [*LAUNCH, "action=plan"]
IMPORTS = [PYTHON, "-c", "import hydra; from pydantic import BaseModel"]
BIG_PLAN = [*PLAN, "cluster.nodes=12500", "cluster.gpus_per_node=8", "batch.global_size=1000003", "output=json"]

BY_HAND = [TORCHRUN, "--nproc-per-node=2", "-m", "benchmarks.by_hand"]
ENGINES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("engine=fsdp",),
    "accelerate": ("engine=accelerate",),
    **{f"deepspeed {stage}": ("engine=deepspeed", f"engine.stage={stage}") for stage in range(4)},
}
STARTED = ("fsdp", "accelerate", "deepspeed 2", "deepspeed 3")

PAIRS = {
    "python launch.py, 2 ranks, 2 steps / torchrun plain.py": (TWO_STEPS, PLAIN_TWO_STEPS, 7),
    **{
        f"the same with {name} / torchrun by_hand.py": (
            [*TWO_STEPS, *ENGINES[name]],
            [*BY_HAND, name, "--steps", "2"],
            3,
        )
        for name in STARTED
    },
    "action=plan / import hydra, pydantic": (PLAN, IMPORTS, 15),
    "action=plan on 100,000 ranks / import hydra, pydantic": (BIG_PLAN, IMPORTS, 15),
}


def seconds(command: list[str], folder: str, failed: list[int]) -> float:
    """Return the seconds from start to exit in ``folder``. A failed run is added to ``failed`` and repeated.

    The plain script's gloo sometimes aborts or hangs at exit.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    reason = "it took more than 60 s"
    for _ in range(5):
        began = time.perf_counter()
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=60)
            if done.returncode == 0:
                return time.perf_counter() - began
            reason = done.stderr
        failed.append(1)
    raise RuntimeError(f"{' '.join(command)} failed five times in a row: {reason}")


def rows() -> list[dict[str, Any]]:
    """Return a row per pair of commands: medians in seconds, and the median of the turns' ratios."""
    found = []
    for name, (ours, other, turns) in PAIRS.items():
        failed: tuple[list[int], list[int]] = ([], [])
        with tempfile.TemporaryDirectory() as folder:
            measured = [
                (seconds(ours, folder, failed[0]), seconds(other, folder, failed[1])) for _ in range(turns + 1)
            ][1:]  # the first turn reads from the disk
        found.append(
            {
                "command / compared to": name,
                "s": statistics.median(ours_s for ours_s, _ in measured),
                "compared to s": statistics.median(other_s for _, other_s in measured),
                "ratio": statistics.median(ours_s / other_s for ours_s, other_s in measured),
                "failed": f"{len(failed[0])} / {len(failed[1])}",
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
