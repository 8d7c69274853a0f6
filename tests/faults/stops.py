"""Define rows of the fault table: runs that are stopped and resume, on the same and on other hardware."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.faults.case import SLOWLY, TWO, Case, Command, check, free_port, wait_until
from tests.faults.table import References, row, section, signalled
from tests.faults.task import fault

ADAM_ROUNDING = 1e-4  # Adam amplifies rounding, since it divides by the size of the gradient
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2")

section("Stops")


@row("TERM, INT, USR2 at start-up (0.2, 0.5, 0.8 s after the command): three stops in a row")
def at_start(case: Case, _: References) -> None:
    for number, (name, after_s) in enumerate(zip(SIGNALS, (0.2, 0.5, 0.8), strict=True), 1):
        command = case.start(**SLOWLY)
        time.sleep(after_s)
        command.send(name)
        case.expect_stop(command, name)
        check(case.outcome["step"] == number, f"stopped at step {case.outcome['step']}, not {number}")
    case.run_to_end()


def at_a_call(at: str, call: int, case: Case, _: References) -> None:
    for name in SIGNALS:
        case.expect_stop(case.start(faults=[signalled(name, at, call)]), name)
    case.run_to_end()


row("TERM, INT, USR2 while the data is opened: three stops in a row")(partial(at_a_call, "data", 1))
row("TERM, INT, USR2 in mid-step: three stops in a row", everywhere=True)(partial(at_a_call, "step", 10))
row("TERM, INT, USR2 in an evaluation: three stops in a row")(partial(at_a_call, "evaluation", 3))


def send_in_a_save(case: Case, send: Callable[[], None]) -> None:
    wait_until(case.saving, "a save", poll_s=0.0005)
    send()


@row("TERM, INT, USR2 in a save: three stops in a row", everywhere=True)
def in_a_save(case: Case, _: References) -> None:
    for name in SIGNALS:
        command = case.start(**SLOWLY)
        send_in_a_save(case, partial(command.send, name))
        check(case.saving(), "the save was over before the signal came")
        case.expect_stop(command, name)
    case.run_to_end()


@row("TERM, and TERM again while the stop is being saved")
def while_stopping(case: Case, _: References) -> None:
    command = case.start("checkpoint.every=null", faults=[signalled("SIGTERM", "step", 20)])
    send_in_a_save(case, partial(command.send, "SIGTERM"))
    case.expect_stop(command, "SIGTERM")
    case.run_to_end()


@row("INT, and a second INT while a step takes long: ends at once")
def second_interrupt(case: Case, _: References) -> None:
    command = case.start(faults=[fault("hang", "step", 25)])
    case.await_step(20)
    command.send("SIGINT")
    wait_until(lambda: "Ctrl-C again" in command.printed, "the hint")
    command.send("SIGINT")
    began = time.monotonic()
    case.expect_end(command, None, 130)
    check(time.monotonic() - began < 5, "the command took more than 5 s to end")
    case.run_to_end()
    case.expect_found_dead()


@row("USR2 to rank 0 alone, then to rank 1 alone")
def one_worker(case: Case, _: References) -> None:
    for rank in (0, 1):
        case.expect_stop(case.start(faults=[signalled("SIGUSR2", "step", 15, "itself", rank)]), "SIGUSR2")
    case.run_to_end()


@row("USR2 to one worker of torchrun; resumed by python launch.py")
def one_worker_of_torchrun(case: Case, _: References) -> None:
    case.expect_stop(case.start(by=TWO, faults=[signalled("SIGUSR2", "step", 25, "itself", 1)]), "SIGUSR2", 0)
    case.run_to_end()


@row("TERM to torchrun; resumed by python launch.py")
def torchrun(case: Case, _: References) -> None:
    case.expect_stop(case.start(by=TWO, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM", 1)
    case.run_to_end()


@row("TERM; AdamW and the average of the weights", reference="adamw")
def adamw(case: Case, _: References) -> None:
    more = ("optimizer=adamw", "ema=100sa")
    case.expect_stop(case.start(*more, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.run_to_end(*more)


@row(
    "a finished run is extended (2ep to 3ep); TERM, then an exception of rank 1, in the added steps",
    reference="extended",
)
def longer(case: Case, _: References) -> None:
    case.run_to_end("duration=2ep")  # 32 steps
    case.expect_stop(case.start(faults=[signalled("SIGTERM", "step", 5)]), "SIGTERM")
    case.expect_crash(case.start(faults=[fault("raise", "step", 6, 1)]), "^rank 1 crashed: ValueError: boom")
    case.run_to_end()


section("Other hardware")


def elsewhere(name: str, before: int, overrides: tuple[str, ...], case: Case, _: References) -> None:
    there = f"cluster.gpus_per_node={before}"
    case.expect_stop(case.start(there, faults=[signalled(name, "step", 25)]), name)
    case.resume_elsewhere(*overrides)


row("TERM in mid-epoch; resumes on fewer ranks", "3 → 2", everywhere=True)(partial(elsewhere, "SIGTERM", 3, ()))
row("USR2 in mid-epoch; resumes on more ranks, 5 samples at a time", "2 → 3", everywhere=True)(
    partial(elsewhere, "SIGUSR2", 2, ("cluster.gpus_per_node=3", "batch.per_gpu=5"))
)
row("INT in mid-epoch; resumes on one rank", "4 → 1")(partial(elsewhere, "SIGINT", 4, ("cluster.gpus_per_node=1",)))


@row(
    "TERM in mid-epoch; resumes on fewer ranks; AdamW and the average of the weights", "3 → 2", "adamw", everywhere=True
)
def adamw_elsewhere(case: Case, _: References) -> None:
    case.rounding = ADAM_ROUNDING
    there = ("cluster.gpus_per_node=3", "optimizer=adamw", "ema=100sa")
    case.expect_stop(case.start(*there, faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    case.resume_elsewhere()


def two_machines(case: Case, *overrides: str, **more: Any) -> list[Command]:
    meeting = ("cluster.nodes=2", f"cluster.rendezvous=127.0.0.1:{free_port()}", "cluster.gpus_per_node=1")
    return [case.start(*meeting, *overrides, **more) for _ in range(2)]


@row("TERM to one of two machines; resumes on one of them", "2 × 1 → 1 × 1")
def fewer_machines(case: Case, _: References) -> None:
    machines = two_machines(case, **SLOWLY)
    case.await_step(25)
    machines[1].send("SIGTERM")
    for machine in machines:
        case.expect_stop(machine, "SIGTERM")
    case.resume_elsewhere("cluster.gpus_per_node=1")


@row("TERM; resumes on two machines", "1 × 2 → 2 × 1")
def more_machines(case: Case, _: References) -> None:
    case.exact = False  # a rank that has its machine to itself uses more threads
    case.expect_stop(case.start(faults=[signalled("SIGTERM", "step", 25)]), "SIGTERM")
    for machine in two_machines(case):
        case.expect_end(machine, "finished", 0)


@row("a machine without rank 0 is lost (SIGKILL of its launcher); resumes on the other", "2 × 1 → 1 × 1")
def lost_machine(case: Case, _: References) -> None:
    first, other = machines_by_rank(case)
    other.send("SIGKILL")
    case.expect_crash(first, "^no word from rank 1 ")
    other.exit_code()
    case.resume_elsewhere("cluster.gpus_per_node=1")


@row(
    "the machine with rank 0 is lost (SIGKILL of its launcher); resumes on the other", "2 × 1 → 1 × 1", everywhere=True
)
def lost_first_machine(case: Case, _: References) -> None:
    first, other = machines_by_rank(case)
    first.send("SIGKILL")
    case.expect_end(other, None, 1)
    check("the machine of rank 0 is gone" in other.printed, f"not printed: {other.printed}")
    first.exit_code()
    case.resume_elsewhere("cluster.gpus_per_node=1")
    case.expect_found_dead()


def machines_by_rank(case: Case) -> list[Command]:
    machines = two_machines(case, **SLOWLY)
    case.await_step(25)
    return sorted(machines, key=lambda machine: "training on 2 ranks" not in machine.printed)
