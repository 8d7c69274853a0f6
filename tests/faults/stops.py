"""Rows of the fault table: runs that are stopped and resume, on the same and on other hardware."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.faults.case import SLOWLY, TWO, Case, Command, check, free_port, wait_until
from tests.faults.table import References, row, section, signalled
from tests.faults.task import fault

ADAM_ROUNDING = 1e-4  # it divides by the size of the gradient
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2")

section("Stops")


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
row("TERM, INT, USR2 in mid-step: three stops in a row", everywhere=True)(partial(by_the_task, "step", 10))
row("TERM, INT, USR2 in an evaluation: three stops in a row")(partial(by_the_task, "evaluation", 3))


def send_in_a_save(case: Case, send: Callable[[], None]) -> None:
    wait_until(case.saving, "a save", poll_s=0.0005)
    send()


@row("TERM, INT, USR2 in a save: three stops in a row", everywhere=True)
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
        case.stopped(case.start(faults=[signalled("SIGUSR2", "step", 15, "itself", rank)]), "SIGUSR2")
    case.goes_on()


@row("USR2 to one worker of torchrun; goes on by python launch.py")
def one_worker_of_torchrun(case: Case, _: References) -> None:
    case.stopped(case.start(by=TWO, faults=[signalled("SIGUSR2", "step", 25, "itself", 1)]), "SIGUSR2", 0)
    case.goes_on()


@row("TERM to torchrun; goes on by python launch.py")
def torchrun(case: Case, _: References) -> None:
    case.stopped(case.start(by=TWO, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM", 1)
    case.goes_on()


@row("TERM; AdamW and the average of the weights", reference="adamw")
def adamw(case: Case, _: References) -> None:
    more = ("optimizer=adamw", "ema=100sa")
    case.stopped(case.start(*more, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.goes_on(*more)


@row(
    "a finished run is made longer (2ep to 3ep); TERM, and an exception of rank 1, in what was added",
    reference="extended",
)
def longer(case: Case, _: References) -> None:
    case.goes_on("duration=2ep")  # 32 steps
    case.stopped(case.start(faults=[signalled("SIGTERM", "step", 5)]), "SIGTERM")
    case.crashed(case.start(faults=[fault("raise", "step", 6, 1)]), "^rank 1 crashed: ValueError: boom")
    case.goes_on()


section("Other hardware")


def elsewhere(name: str, before: int, overrides: tuple[str, ...], case: Case, _: References) -> None:
    there = f"cluster.gpus_per_node={before}"
    case.stopped(case.start(there, faults=[signalled(name, "step", 25)]), name)
    case.goes_on_elsewhere(*overrides)


row("TERM in mid-epoch; goes on on fewer ranks", "3 → 2", everywhere=True)(partial(elsewhere, "SIGTERM", 3, ()))
row("USR2 in mid-epoch; goes on on more ranks, 5 samples at a time", "2 → 3", everywhere=True)(
    partial(elsewhere, "SIGUSR2", 2, ("cluster.gpus_per_node=3", "batch.per_gpu=5"))
)
row("INT in mid-epoch; goes on on one", "4 → 1")(partial(elsewhere, "SIGINT", 4, ("cluster.gpus_per_node=1",)))


@row(
    "TERM in mid-epoch; goes on on fewer ranks; AdamW and the average of the weights", "3 → 2", "adamw", everywhere=True
)
def adamw_elsewhere(case: Case, _: References) -> None:
    case.rounding = ADAM_ROUNDING
    there = ("cluster.gpus_per_node=3", "optimizer=adamw", "ema=100sa")
    case.stopped(case.start(*there, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.goes_on_elsewhere()


def two_machines(case: Case, *overrides: str, **more: Any) -> list[Command]:
    meeting = ("cluster.nodes=2", f"cluster.rendezvous=127.0.0.1:{free_port()}", "cluster.gpus_per_node=1")
    return [case.start(*meeting, *overrides, **more) for _ in range(2)]


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
    case.exact = False  # a rank that has its machine for itself has more threads
    case.stopped(case.start(faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    for machine in two_machines(case):
        case.ended(machine, "finished", 0)


@row("a machine without rank 0 is lost (SIGKILL of its launcher); goes on on the other", "2 × 1 → 1 × 1")
def lost_machine(case: Case, _: References) -> None:
    first, other = machines_by_rank(case)
    other.send("SIGKILL")
    case.crashed(first, "^no word from rank 1 ")
    other.code()
    case.goes_on_elsewhere("cluster.gpus_per_node=1")


@row(
    "the machine with rank 0 is lost (SIGKILL of its launcher); goes on on the other", "2 × 1 → 1 × 1", everywhere=True
)
def lost_first_machine(case: Case, _: References) -> None:
    first, other = machines_by_rank(case)
    first.send("SIGKILL")
    case.ended(other, None, 1)
    check("the machine of rank 0 is gone" in other.said, f"it isn't said: {other.said}")
    first.code()
    case.goes_on_elsewhere("cluster.gpus_per_node=1")
    case.found_dead()


def machines_by_rank(case: Case) -> list[Command]:
    machines = two_machines(case, **SLOWLY)
    case.await_step(25)
    return sorted(machines, key=lambda machine: "training on 2 ranks" not in machine.said)
