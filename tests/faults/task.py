"""The task of the fault table, which records the samples it fetches and causes the faults in its environment.

FAULTS is a JSON list of ``fault(...)``; FETCHED a folder. Both are in the environment, so that the config, and with it
the run's identity, is the same with faults and without.
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
BALLAST = 2 << 20  # frozen weights that cost no time to train with, but some to save
ROOM = 768 << 20  # bytes that are left where memory is limited
SCRATCH = 64 << 20  # that a sample takes in a pass then: 8 fit, 16 don't

Fault = dict[str, Any]


def fault(do: str, at: str, call: int = 1, rank: int = 0, restart: int | None = 0, **more: Any) -> Fault:
    """Return a fault: an action at a numbered call of a hook in a process of ``rank``.

    Args:
        do: a signal's name; raise, hang, wait, nan (the loss), nan_inputs, memory, fill, limit, fork (a process that
            lives on for a minute) or slow (the writing of final/, later on).
        at: prepare, data and validation (when they are opened), model, summarise, fetch (of a sample), step (the loss
            in training), evaluation (the loss in one).
        restart: of the agent, by its number; None: of any.
        more: ``to="launcher"`` of a signal; ``leave`` (bytes) of fill and limit, ``path`` of fill; ``sample`` (bytes)
            of memory; ``seconds`` of wait and slow.
    """
    return {"do": do, "at": at, "call": call, "rank": rank, "restart": restart, **more}


class Faulty(Slow):
    """The regression of tests.support.tasks, with dropout, augmentation and units; ``norm``: and a BatchNorm."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(samples=int(os.environ.get("SAMPLES", SAMPLES)))
        self.norm = norm
        self.inputs += float(os.environ.get("SHIFT", "0"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.faults: list[Fault] = json.loads(os.environ.get("FAULTS", "[]"))
        self.delay_s = float(os.environ.get("DELAY_S", "0"))
        self.calls: Counter[str] = Counter()
        self.scratch = 0  # bytes a sample
        places = {one["at"] for one in self.faults}
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
        """Do what is to be done at this call; gives it, too."""
        self.calls[at] += 1
        here = {"at": at, "call": self.calls[at], "rank": self.rank}
        met = [one for one in self.faults if here.items() <= one.items() and one["restart"] in (None, self.restart)]
        for one in met:
            self.do(one)
        return [one["do"] for one in met]

    def do(self, one: Fault) -> None:
        match one["do"]:
            case "raise":
                raise ValueError("boom")
            case "hang":
                time.sleep(1e6)
            case "wait":
                time.sleep(one["seconds"])
            case "memory":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
                self.scratch = one.get("sample", SCRATCH)
            case "fork":
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            case "slow":
                save_final = isobatch.trainers.run.save_final
                isobatch.trainers.run.save_final = lambda *args, **more: (
                    time.sleep(one["seconds"]),
                    save_final(*args, **more),
                )
            case "fill":
                fill(Path(one["path"]), one["leave"])
            case "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (one["leave"], resource.RLIM_INFINITY))
            case name if name in signal.Signals.__members__:
                os.kill(os.getppid() if one.get("to") == "launcher" else os.getpid(), signal.Signals[name])
                time.sleep(0.2)  # the launcher's turn


def fill(path: Path, leave: int) -> None:
    """Fill the disk that ``path`` is on, but for ``leave`` bytes; if none, to the end of this process's output, too."""
    left = os.statvfs(path.parent)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize - leave)
    with suppress(OSError):
        for _ in range(0 if leave else 1 << 13):
            os.write(1, b" ")


class Rows(OneByOne):
    """Each process writes down the rows that it fetches."""

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
    """The name of this start of the workers: the elastic agent's number of it, after the job's in a job of Slurm's."""
    here = JobStart.here(env)
    job = f"{here.id}.{here.restart}." if here.id else ""
    return job + env.get("TORCHELASTIC_RESTART_COUNT", "0")
