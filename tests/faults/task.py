"""Define the task of the fault table, which records the samples it fetches and causes the faults in its environment.

FAULTS is a JSON list of ``fault(...)``, and FETCHED is a folder. Both are in the environment, so that the config and
the run's identity are the same with faults and without.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import isobatch.trainers.run
from isobatch.slurm.state import JobStart
from tests.support.tasks import OneByOne, Slow

SAMPLES = 500
BALLAST = 2 << 20  # number of frozen weights, which take no time in training but some in a save
ROOM = 768 << 20  # free bytes after memory is limited
SCRATCH = 64 << 20  # bytes that each sample of a pass then takes: 8 samples fit, 16 don't

Fault = dict[str, Any]


def fault(do: str, at: str, call: int = 1, rank: int = 0, restart: int | None = 0, **more: Any) -> Fault:
    """Return a fault: an action at a numbered call of a hook in a process of ``rank``.

    Args:
        do: a signal's name; raise, hang, wait, nan (the loss), nan_inputs, memory, fill, limit, fork (a process that
            lives for another minute) or slow (the later writing of final/).
        at: prepare, data and validation (when they are opened), model, summarise, fetch (of a sample), step (the loss
            in training), evaluation (the loss in an evaluation).
        restart: number of the agent's restart, or None for any.
        more: ``to="launcher"`` for a signal; ``leave`` (bytes) for fill and limit; ``path`` for fill; ``sample``
            (bytes) for memory; ``seconds`` for wait and slow.
    """
    return {"do": do, "at": at, "call": call, "rank": rank, "restart": restart, **more}


class Faulty(Slow):
    """The regression of tests.support.tasks, with dropout, augmentation, units and, with ``norm``, a BatchNorm."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(samples=int(os.environ.get("SAMPLES", SAMPLES)))
        self.norm = norm
        self.inputs += float(os.environ.get("SHIFT", "0"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.faults: list[Fault] = json.loads(os.environ.get("FAULTS", "[]"))
        self.delay_s = float(os.environ.get("DELAY_S", "0"))
        self.calls: Counter[str] = Counter()
        self.scratch = 0  # bytes per sample
        places = {fault["at"] for fault in self.faults}
        if "prepare" in places:
            self.prepare = lambda: self.meet("prepare")
        if "summarise" in places:
            self.summarise = lambda totals: dict.fromkeys(self.meet("summarise"), 0.0)

    def model(self) -> nn.Module:
        self.meet("model")
        model = super().model()
        if self.norm:
            model.insert(1, nn.BatchNorm1d(self.width))
        model.register_parameter("ballast", nn.Parameter(torch.zeros(BALLAST), requires_grad=False))
        return model

    def train_data(self) -> Any:
        self.meet("data")
        return Rows(self)

    def val_data(self) -> Any:
        self.meet("validation")
        return super().val_data()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        time.sleep(self.delay_s)
        met = self.meet("step" if model.training else "evaluation")
        scratch = torch.empty(len(batch[0]) * self.scratch, dtype=torch.uint8)
        if "nan_inputs" in met:
            batch = (batch[0] * float("nan"), *batch[1:])
        loss, units = super().loss(model, batch)
        del scratch
        return (loss * float("nan") if "nan" in met else loss), units

    def meet(self, at: str) -> list[str]:
        """Cause the faults that are due at this call, and return their actions."""
        self.calls[at] += 1
        here = {"at": at, "call": self.calls[at], "rank": self.rank}
        due = [each for each in self.faults if here.items() <= each.items() and each["restart"] in (None, self.restart)]
        for each in due:
            self.do(each)
        return [each["do"] for each in due]

    def do(self, fault: Fault) -> None:
        match fault["do"]:
            case "raise":
                raise ValueError("boom")
            case "hang":
                time.sleep(1e6)
            case "wait":
                time.sleep(fault["seconds"])
            case "memory":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
                self.scratch = fault.get("sample", SCRATCH)
            case "fork":
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            case "slow":
                save_final = isobatch.trainers.run.save_final
                isobatch.trainers.run.save_final = lambda *args, **more: (
                    time.sleep(fault["seconds"]),
                    save_final(*args, **more),
                )
            case "fill":
                fill(Path(fault["path"]), fault["leave"])
            case "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["leave"], resource.RLIM_INFINITY))
            case name if name in signal.Signals.__members__:
                os.kill(os.getppid() if fault.get("to") == "launcher" else os.getpid(), signal.Signals[name])
                time.sleep(0.2)  # let the launcher react


def fill(path: Path, leave: int) -> None:
    """Fill the disk of ``path`` except for ``leave`` bytes. With 0, also fill the rest of the output's last block."""
    left = os.statvfs(path.parent)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize - leave)
    with suppress(OSError):
        for _ in range(0 if leave else 1 << 13):
            os.write(1, b" ")


class Rows(OneByOne):
    """A dataset in which each process records the rows that it fetches."""

    def __init__(self, task: Faulty) -> None:
        super().__init__(task)
        self.opened: tuple[int, int] = (0, -1)

    def __getitem__(self, row: int) -> Any:
        self.note(row)
        self.task.meet("fetch")  # type: ignore[attr-defined]
        return super().__getitem__(row)

    def note(self, row: int) -> None:
        if folder := os.environ.get("FETCHED"):
            if self.opened[0] != os.getpid():
                name = f"{folder}/{start(os.environ)}-{os.getpid()}"
                self.opened = os.getpid(), os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(self.opened[1], b"%d\n" % row)


def start(env: Mapping[str, str]) -> str:
    """Return the name of this start of the workers: the Slurm job's id and restart, if any, and the agent's restart."""
    here = JobStart.here(env)
    job = f"{here.id}.{here.restart}." if here.id else ""
    return job + env.get("TORCHELASTIC_RESTART_COUNT", "0")
