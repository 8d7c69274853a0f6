"""The rows of the fault table: each causes something for real, goes on, and says what it has to be called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.soak import processes_of
from tests.faults.case import BASE, TORCHRUN, Broken, Case, Command, check, free_port, wait_until
from tests.faults.hostile import DAMAGES
from tests.faults.task import Fault, fault

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2")
TWO = (*TORCHRUN, "--nproc-per-node=2")
SLOWLY = {"DELAY_S": "0.03"}  # a pass
TIMEOUT_S = 4
NOTICED_S = TIMEOUT_S + 3 + 3  # with what the agent waits for words of others, and this machine's slowness


class References:
    """Runs to compare with, each made once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._locks = {name: threading.Lock() for name in REFERENCES}
        self._made: dict[str, Case] = {}

    def __call__(self, name: str) -> Case:
        with self._locks[name]:
            if name not in self._made:
                case = Case(self._folder / name)
                REFERENCES[name](case)
                self._made[name] = case
        return self._made[name]


REFERENCES: dict[str, Callable[[Case], object]] = {
    "plain": lambda case: case.goes_on(),
    "skipping": lambda case: case.goes_on(
        "cluster.gpus_per_node=1", "on_nonfinite=skip", faults=[fault("nan", "step", 30)]
    ),
    "adamw": lambda case: case.goes_on("optimizer=adamw", "ema=100sa"),
    "stopped": lambda case: case.stopped(case.start(faults=[signalled("SIGTERM", "step", 45)]), "SIGTERM"),
}

Act = Callable[[Case, References], None]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        fault: what is done, and how; ``ranks``: before and after.
        reference: the uninterrupted run that it has to be.
    """

    fault: str
    ranks: str
    act: Act
    reference: str = "plain"

    def __call__(self, folder: Path, references: References) -> dict[str, str]:
        """Its cells.

        Raises:
            Broken: it doesn't hold.
        """
        case = Case(folder)
        self.act(case, references)
        compared = case.compared(references(self.reference))
        case.remove()
        ends = [f"{end} ({case.ends.count(end)} ×)" if case.ends.count(end) > 1 else end for end in case.ends]
        causes = [shortened(cause, case) for cause in case.causes]
        return {
            "fault": self.fault,
            "ranks": self.ranks,
            "ended": "; ".join(dict.fromkeys(ends)),
            "cause named": "; ".join(dict.fromkeys(causes)),
            **compared,
        }


def shortened(cause: str, case: Case) -> str:
    """Without paths, and what differs from one run of the table to the next."""
    cause = re.sub(r"pid \d+", "pid N", cause.replace(str(case.run), "DIR"))
    return re.sub(r"since [\d-]+ [\d:]+", "since TIME", cause)


ROWS: list[Row] = []


def row(fault: str, ranks: str = "2 → 2", reference: str = "plain") -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        ROWS.append(Row(fault, ranks, act, reference))
        return act

    return add


def signalled(name: str, at: str, call: int = 1, to: str = "launcher", rank: int = 0) -> Fault:
    return fault(name, at, call, rank, to=to)


# ---- stops


@row("TERM, INT, USR2 at start-up (0.2, 0.5, 0.8 s after the command): three stops in a row")
def at_start(case: Case, _: References) -> None:
    for number, (name, after_s) in enumerate(zip(SIGNALS, (0.2, 0.5, 0.8), strict=True), 1):
        command = case.start(**SLOWLY)
        time.sleep(after_s)
        command.send(name)
        case.stopped(command, name)
        check(case.outcome["step"] == number, f"stopped at step {case.outcome['step']}, not {number}")
    case.goes_on()


def by_the_task(at: str, call: int, case: Case, _: References) -> None:
    for name in SIGNALS:
        case.stopped(case.start(faults=[signalled(name, at, call)]), name)
    case.goes_on()


row("TERM, INT, USR2 while the data is opened: three stops in a row")(partial(by_the_task, "data", 1))
row("TERM, INT, USR2 in mid-step: three stops in a row")(partial(by_the_task, "step", 10))
row("TERM, INT, USR2 in an evaluation: three stops in a row")(partial(by_the_task, "evaluation", 3))


def send_in_a_save(case: Case, send: Callable[[], None]) -> None:
    wait_until(case.saving, "a save", poll_s=0.0005)
    send()


@row("TERM, INT, USR2 in a save: three stops in a row")
def in_a_save(case: Case, _: References) -> None:
    for name in SIGNALS:
        command = case.start(**SLOWLY)
        send_in_a_save(case, partial(command.send, name))
        check(case.saving(), "the save was over before the signal came")
        case.stopped(command, name)
    case.goes_on()


@row("TERM, and TERM again while the stop is being saved")
def while_stopping(case: Case, _: References) -> None:
    command = case.start("checkpoint.every=null", faults=[signalled("SIGTERM", "step", 20)])
    send_in_a_save(case, partial(command.send, "SIGTERM"))
    case.stopped(command, "SIGTERM")
    case.goes_on()


@row("INT, and a second INT while a step takes long: ends at once")
def second_interrupt(case: Case, _: References) -> None:
    command = case.start(faults=[fault("hang", "step", 25)])
    case.await_step(20)
    command.send("SIGINT")
    wait_until(lambda: "Ctrl-C again" in command.said, "the hint")
    command.send("SIGINT")
    began = time.monotonic()
    case.ended(command, None, 130)
    check(time.monotonic() - began < 5, "it took more than 5 s")
    case.goes_on()
    case.found_dead()


@row("USR2 to rank 0 alone, then to rank 1 alone")
def one_worker(case: Case, _: References) -> None:
    for rank in (0, 1):
        case.stopped(case.start(faults=[signalled("SIGUSR2", "step", 15, "worker", rank)]), "SIGUSR2")
    case.goes_on()


@row("USR2 to one worker of torchrun")
def one_worker_of_torchrun(case: Case, _: References) -> None:
    case.stopped(case.start(by=TWO, faults=[signalled("SIGUSR2", "step", 25, "worker", 1)]), "SIGUSR2", 0)
    case.goes_on(by=TWO)


@row("TERM; AdamW and the average of the weights", reference="adamw")
def adamw(case: Case, _: References) -> None:
    more = ("optimizer=adamw", "ema=100sa")
    case.stopped(case.start(*more, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.goes_on(*more)


# ---- other hardware


def elsewhere(name: str, before: int, overrides: tuple[str, ...], case: Case, _: References) -> None:
    there = f"cluster.gpus_per_node={before}"
    case.stopped(case.start(there, faults=[signalled(name, "step", 25)]), name)
    case.goes_on_elsewhere(*overrides)


row("TERM in mid-epoch; goes on on fewer ranks", "3 → 2")(partial(elsewhere, "SIGTERM", 3, ()))
row("USR2 in mid-epoch; goes on on more ranks, 5 at a time", "2 → 3")(
    partial(elsewhere, "SIGUSR2", 2, ("cluster.gpus_per_node=3", "batch.per_gpu=5"))
)
row("INT in mid-epoch; goes on on one", "4 → 1")(partial(elsewhere, "SIGINT", 4, ("cluster.gpus_per_node=1",)))


def two_machines(case: Case, *overrides: str, **more: object) -> list[Command]:
    meeting = ("cluster.nodes=2", f"cluster.rendezvous=127.0.0.1:{free_port()}", "cluster.gpus_per_node=1")
    first = case.start(*meeting, *overrides, **more)  # type: ignore[arg-type]
    return [first, case.start(*meeting, *overrides, **more)]  # type: ignore[arg-type]


@row("TERM to one of two machines; goes on on one of them", "2 × 1 → 1 × 1")
def fewer_machines(case: Case, _: References) -> None:
    machines = two_machines(case, **SLOWLY)
    case.await_step(25)
    machines[1].send("SIGTERM")
    for machine in machines:
        case.stopped(machine, "SIGTERM")
    case.goes_on_elsewhere("cluster.gpus_per_node=1")


@row("TERM; goes on on two machines", "1 × 2 → 2 × 1")
def more_machines(case: Case, _: References) -> None:
    case.stopped(case.start(faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    for machine in two_machines(case):
        case.ended(machine, "finished", 0)


@row("one of two machines is lost (SIGKILL of its launcher); goes on on the other", "2 × 1 → 1 × 1")
def lost_machine(case: Case, _: References) -> None:
    machines = two_machines(case, **SLOWLY)
    case.await_step(25)
    lost = next(one for one in machines if "training on 2 ranks" not in one.said)
    (kept,) = (one for one in machines if one is not lost)
    lost.send("SIGKILL")
    case.crashed(kept, "no word from rank 1|rank 1 crashed: killed by SIGKILL|machine of rank 1")
    lost.code()
    case.goes_on_elsewhere("cluster.gpus_per_node=1")


# ---- crashes


def crashes(faults: list[Fault], cause: str, overrides: tuple[str, ...], case: Case, _: References) -> None:
    """Ends, and goes on by the same command."""
    case.crashed(case.start(*overrides, faults=faults), cause)
    case.goes_on(*overrides)


def restarts(faults: list[Fault], causes: list[str], overrides: tuple[str, ...], case: Case, _: References) -> None:
    """Goes on by itself, once for each of the causes."""
    command = case.start(*overrides, f"cluster.max_restarts={len(causes)}", faults=faults)
    case.ended(command, "finished", 0)
    case.ends.append("finished, 0")
    found = [event["cause"] for event in case.events("restart")]
    check(len(found) == len(causes), f"restarts for {found}, not for {causes}")
    for said, cause in zip(found, causes, strict=True):
        check(re.search(cause, said), f"restart for {said!r}, not {cause!r}")
    check(case.outcome["restarts"] == len(causes), f"{case.outcome['restarts']} restarts in outcome.json")
    case.causes += found


BOOM = r"^ValueError: boom \(task\.py:\d+ in do\)$"
LATE = [fault("raise", "step", 15, 1, restart) for restart in range(3)]

row("rank 1 raises an exception")(
    partial(crashes, [fault("raise", "step", 25, 1)], r"^rank 1 crashed: ValueError: boom \(task\.py:\d+ in do\)$", ())
)
row("rank 0 raises an exception; restarted")(partial(restarts, [fault("raise", "step", 25)], [BOOM], ()))
row("rank 1 raises an exception 15 steps after each of three starts; restarted 3 ×")(
    partial(restarts, LATE, [BOOM] * 3, ())
)
row("SIGKILL of rank 1")(
    partial(crashes, [fault("SIGKILL", "step", 25, 1)], "^rank 1 crashed: killed by SIGKILL", ())
)
row("SIGKILL of rank 0; restarted")(partial(restarts, [fault("SIGKILL", "step", 25)], ["^killed by SIGKILL"], ()))
row("SIGSEGV of rank 1; restarted")(partial(restarts, [fault("SIGSEGV", "step", 25, 1)], ["^killed by SIGSEGV"], ()))
row("SIGKILL of a DataLoader's worker of rank 1")(
    partial(
        crashes,
        [fault("SIGKILL", "fetch", 200, 1)],
        r"^rank 1 crashed: DataLoader worker \(pid \d+\) is killed by signal: Killed",
        ("data.workers=1",),
    )
)
row("the loss of rank 1 is NaN, on_nonfinite=stop")(
    partial(crashes, [fault("nan", "step", 25, 1)], r"^step 25 \(.*\) isn't finite", ("cluster.max_restarts=3",))
)


@row("rank 1 raises an exception at the same step of each start, max_restarts=10")
def no_progress(case: Case, _: References) -> None:
    always = [fault("raise", "step", 25, 1), *(fault("raise", "step", 5, 1, restart) for restart in range(1, 10))]
    case.crashed(case.start("cluster.max_restarts=10", faults=always), "^rank 1 crashed: ValueError: boom .*no further")
    found = [event["cause"] for event in case.events("restart")]
    check(len(found) == 1, f"{len(found)} restarts")
    case.goes_on()


@row("rank 1 of torchrun raises an exception, --max-restarts=1")
def torchrun_restarts(case: Case, _: References) -> None:
    by = (*TWO, "--max-restarts=1")
    case.ended(case.start(by=by, faults=[fault("raise", "step", 25, 1)]), "finished", 0)
    case.ends.append("finished, 0")
    case.causes.append(case.event("restart", cause=BOOM)["cause"])


@row("SIGKILL of rank 1 of torchrun")
def torchrun_killed(case: Case, _: References) -> None:
    case.ended(case.start(by=TWO, faults=[fault("SIGKILL", "step", 25, 1)]), "crashed", 1, "no word from rank 1")
    case.goes_on(by=TWO)


@row("SIGKILL of the launcher")
def launcher_killed(case: Case, _: References) -> None:
    command = case.start(**SLOWLY)
    case.await_step(25)
    command.send("SIGKILL")
    case.ended(command, None, -9)
    case.goes_on()
    case.found_dead()


@row("SIGKILL of all processes", "3 → 2")
def all_killed(case: Case, _: References) -> None:
    command = case.start("cluster.gpus_per_node=3", **SLOWLY)
    case.await_step(25)
    command.kill_all()
    case.ended(command, None, -9)
    case.goes_on_elsewhere()
    case.found_dead()


@row("SIGKILL of all processes in a save, twice")
def killed_in_a_save(case: Case, _: References) -> None:
    for _again in range(2):
        command = case.start(**SLOWLY)
        send_in_a_save(case, command.kill_all)
        case.ended(command, None, -9)
        check(case.saving(), "the save was over before the signal came")
    case.goes_on()
    case.found_dead()
    check(not case.saving(), "what was half-written is still there")


@contextmanager
def noticed(case: Case) -> Iterator[None]:
    """From the last step before a hang to its restart."""
    case.await_step(24)
    began = time.monotonic()
    wait_until(lambda: case.events("restart"), "the restart")
    took = time.monotonic() - began
    check(took < NOTICED_S, f"found after {took:.1f} s")
    yield


@row(f"rank 1 hangs (sleeps), cluster.timeout_s={TIMEOUT_S}; restarted")
def hangs(case: Case, _: References) -> None:
    stuck = [fault("hang", "step", 25, 1)]
    command = case.start("cluster.max_restarts=1", f"cluster.timeout_s={TIMEOUT_S}", faults=stuck)
    with noticed(case):
        case.ended(command, "finished", 0)
    case.ends.append("finished, 0")
    case.causes.append(case.event("restart", cause=r"it hung: no progress for 4 s \(task\.py:\d+ in do\)", rank=1)["cause"])
    for rank in (0, 1):
        log = (case.run / f"logs/rank-{rank}.log").read_text()
        check("most recent call first" in log, f"no stacks of rank {rank}")


@row(f"SIGSTOP of rank 1, cluster.timeout_s={TIMEOUT_S}; restarted")
def suspended(case: Case, _: References) -> None:
    stuck = [fault("SIGSTOP", "step", 25, 1)]
    command = case.start("cluster.max_restarts=1", f"cluster.timeout_s={TIMEOUT_S}", faults=stuck)
    with noticed(case):
        case.ended(command, "finished", 0)
    case.ends.append("finished, 0")
    case.causes.append(case.event("restart", cause="rank 1")["cause"])
    for rank in (0, 1):
        log = (case.run / f"logs/rank-{rank}.log").read_text()
        check("most recent call first" in log, f"no stacks of rank {rank}")


@row("the loss of rank 1 is NaN, on_nonfinite=skip; then TERM", "2 → 2", "skipping")
def skips(case: Case, references: References) -> None:
    """Compared with a run on one rank in which the same step was skipped; and is no run in which none was."""
    case.exact = False
    both = [fault("nan", "step", 30, 1), signalled("SIGTERM", "step", 40)]
    case.stopped(case.start("on_nonfinite=skip", faults=both), "SIGTERM")
    case.goes_on("on_nonfinite=skip")
    case.causes.append(case.event("skip", step=30, skipped=1, text="^step 30 .* isn't finite.*skipped")["text"])
    check(case.metrics()[-1].get("skipped", 1) == 1, f"{case.metrics()[-1]}")
    check(case.apart(references("plain")) > 1e-4, "nothing was skipped")


@row("memory runs out on rank 1 (RLIMIT_AS): restarted with half the per-GPU batch")
def out_of_memory(case: Case, _: References) -> None:
    case.exact = False  # another cut
    limited = [fault("memory", "data", rank=1, restart=None)]
    command = case.ended(case.start(faults=limited), "finished", 0)
    case.ends.append("finished, 0")
    case.causes.append(case.event("restart", kind="oom", rank=1, per_gpu_before=16, per_gpu=8)["cause"])
    check("per GPU" in command.said or "per_gpu" in command.said, "the summary doesn't say it")


# ---- disks


@contextmanager
def small_disk(case: Case, megabytes: int) -> Iterator[None]:
    """The run directory on a disk of its own."""
    case.run.mkdir()
    size = f"size={megabytes}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", case.run], capture_output=True).returncode:
        raise Broken("only root can mount the small disk that is to be full")
    try:
        yield
        kept = case.folder / "kept"
        shutil.copytree(case.run, kept, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", case.run], check=True)
    case.run.rmdir()
    kept.rename(case.run)


@row("the disk is full from step 12 on but for 1 MB, and so in two saves; then SIGKILL of all; checkpoint.on_error=continue")
def disk_full(case: Case, _: References) -> None:
    with small_disk(case, 60):
        filling = fault("fill", "step", 12, path=str(case.run / "logs/ballast"), leave=1 << 20)
        command = case.start(faults=[filling], **SLOWLY)
        case.await_step(35)
        check([path.name for path in case.checkpoints()] == ["step-00000010"], f"{case.checkpoints()}")
        command.kill_all()
        case.ended(command, None, -9)
        warnings = [event["text"] for event in case.events("warning")]
        check(len(warnings) == 2 and all("No space left" in text for text in warnings), f"{warnings}")
        case.causes += warnings
        (case.run / "logs/ballast").unlink()
        case.goes_on()
        check(case.event("going_on")["step"] == 10, "it didn't go on from the older one")


@row("the disk is full from step 12 on, to the last byte; checkpoint.on_error=stop")
def disk_full_stop(case: Case, _: References) -> None:
    with small_disk(case, 60):
        filling = fault("fill", "step", 12, path=str(case.run / "logs/ballast"), leave=0)
        case.crashed(case.start("checkpoint.on_error=stop", faults=[filling]), "can't be saved.*No space left")
        (case.run / "logs/ballast").unlink()
        case.goes_on("checkpoint.on_error=stop")
        check(case.event("going_on")["step"] == 10, "it didn't go on from the older one")


def damaged(done: str, case: Case, references: References) -> None:
    damage, said = DAMAGES[done]
    shutil.copytree(references("stopped").folder, case.folder, dirs_exist_ok=True, symlinks=True)
    newest = case.checkpoints()[-1]
    damage(newest)
    case._started.append((case.folder / "fetched-0", 0))
    case.goes_on()
    case.causes.append(case.event("skipped", text=f"^checkpoint step-00000045 is skipped: .*{said}")["text"])
    check(case.event("going_on")["step"] == 40, "it didn't go on from the one before")
    check(not (case.folder / "unpickled").exists(), "it was unpickled")


for done in DAMAGES:
    row(f"newest checkpoint: {done}")(partial(damaged, done))


@row("all checkpoints are damaged (then one is mended)")
def none_good(case: Case, references: References) -> None:
    shutil.copytree(references("stopped").folder, case.folder, dirs_exist_ok=True, symlinks=True)
    case._started.append((case.folder / "fetched-0", 0))
    kept = case.checkpoints()[0] / "manifest.json"
    good = kept.read_bytes()
    for path in case.checkpoints():
        os.truncate(path / "manifest.json", 100)
    before = {path: path.read_bytes() for path in (case.run / "checkpoints").rglob("*") if path.is_file()}
    case.ended(case.start(), "refused", 2, "no checkpoint in .* is good .*run.new=true")
    after = {path: path.read_bytes() for path in (case.run / "checkpoints").rglob("*") if path.is_file()}
    check(before == after, "something was overwritten")
    kept.write_bytes(good)
    case.goes_on()


# ---- what isn't to be done


@row("a second launch while the first one works; both go on when that was killed (SIGKILL of its launcher)")
def second_launch(case: Case, _: References) -> None:
    first = case.start(**SLOWLY)
    case.await_step(15)
    second = case.start()
    refused = second.code()
    check(refused == 2, f"the second launch ended with {refused}: {second.said}")
    (named,) = re.findall(r"another launch works in .*\(host (\S+), pid (\d+), since [\d-]+ [\d:]+\)", second.said) or [("", "0")]
    check(named[0] == os.uname().nodename and int(named[1]) in processes_of(case.run), f"it names {named}: {second.said}")
    check(case.outcome["state"] == "running", f"{case.outcome}")
    case.ends.append("second: refused, 2")
    case.causes.append(second.said.strip().removeprefix("isobatch: "))
    first.send("SIGKILL")
    case.ended(first, None, -9)
    case.goes_on()
    case.found_dead()


@row("other data (the same length, other values) where it goes on")
def other_data(case: Case, _: References) -> None:
    case.counted = False  # the fingerprint looks at samples, too
    base = (*BASE, "data.fingerprint=true")
    case.stopped(case.start(base=base, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.ended(case.start(base=base, SHIFT="1"), "refused", 2, "data has changed: its fingerprint is .*, and was ")
    case.goes_on(base=base)
