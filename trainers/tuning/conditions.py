"""What the results of a part depend on: where it is the same, a stored result is used again."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from isobatch.conf.existing import run_of
from isobatch.conf.identity import digest, identity, values
from isobatch.conf.rundir.reading import last_step
from isobatch.trainers.loop.hardware import device_name
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.meter import hardware_memory

TRAINED = ("branch", "sharpness")  # parts that measure a trained run, be it init_from or the run directory
FROM_WEIGHTS = ("noise", "lr")  # parts that do so only with init_from
HARDWARE = ("memory", "speed")  # parts that don't depend on the recipe, and do on the hardware
KEYS = {"memory": {"margin"}, "noise": {"samples"}, "branch": {"samples"}, "lr": {"samples"}}
"""The keys of ``tune`` that each part depends on."""
# sections and keys that neither the time nor the memory of a step depends on
NOT_OF_A_STEP = ("batch", "lr", "duration", "evaluate", "checkpoint", "noise", "log", "stop", "run", "plan", "report",
                 "search", "tune", "action", "output", "given", "chosen", "seed", "init_from", "check")  # fmt: skip


def conditions_of(bench: Bench, part: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the conditions of ``part``, the same on all ranks, as JSON values.

    Args:
        before: the results of other parts, which it may rest on.
    """
    config = bench.config
    found: dict[str, Any] = {
        "code": bench.code,
        "tune": config.tune.model_dump(mode="json", include=KEYS.get(part, set())),
    }
    if part in HARDWARE:
        of_a_step = {key: value for key, value in values(config).items() if key.split(".")[0] not in NOT_OF_A_STEP}
        found |= {
            "config": digest(of_a_step),
            "world_size": bench.session.world.size,
            "device": device_name(bench.session.world.device),
            "memory": hardware_memory(bench.session.world.device),
            "torch": torch.__version__,
        }
    else:
        found |= {"run": identity(config), "init_from": config.init_from}
    if part == "law":
        tuned = config.task.tuned.get(config.optimizer.name)
        found["tuned"] = tuned and tuned.model_dump(mode="json")
    if part == "speed":
        fits = (before or {}).get("memory", {}).get("per_gpu")
        found["cpu"] = cpu()
        found["sizes_to"] = bench.opened.plan.cut.per_gpu if fits is None else fits
    if part in TRAINED or (part in FROM_WEIGHTS and config.init_from):
        weights = config.init_from and run_of(Path(config.init_from).expanduser())
        found["trained"] = last_step(weights or bench.run)
    return dict(bench.agree(found))


def cpu() -> dict[str, Any]:
    """Return what the speed depends on beside the device: the CPU's model, the usable cores, and torch's threads."""
    info = Path("/proc/cpuinfo")  # in some containers it isn't there
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    model = models[0] if models else platform.processor() or platform.machine()
    return {"model": model, "cores": cores, "threads": torch.get_num_threads()}
