"""Rows of the fault table: processes that fail, die or hang."""

from __future__ import annotations

import os
import re
import time
from functools import partial

from benchmarks.soak import processes_of
from tests.faults.case import SLOWLY, TWO, Case, check, wait_until
from tests.faults.stops import send_in_a_save
from tests.faults.table import Act, References, row, section, signalled
from tests.faults.task import Fault, fault

TIMEOUT_S = 4
NOTICED_S = TIMEOUT_S + 3 + 3  # with the time that ranks have to say what they know, and that of a busy machine
BOOM = r"ValueError: boom \(task\.py:\d+ in do\)"

section("Crashes")


def ends(faults: list[Fault], cause: str, *overrides: str) -> Act:
    """It ends as ``crashed``, and goes on by the same command."""

    def act(case: Case, _: References) -> None:
        case.crashed(case.start(*overrides, faults=faults), cause)
        case.goes_on(*overrides)

    return act


def restarts(faults: list[Fault], causes: list[str], *overrides: str) -> Act:
    """It goes on by itself, once for each of the causes."""

    def act(case: Case, _: References) -> None:
        case.finished(case.start(*overrides, f"cluster.max_restarts={len(causes)}", faults=faults))
        found = [event["cause"] for event in case.events("restart")]
        check(len(found) == len(causes), f"restarts for {found}, not for {causes}")
        for said, cause in zip(found, causes, strict=True):
            check(re.search(cause, said), f"restart for {said!r}, not {cause!r}")
        check(case.outcome["restarts"] == len(causes), f"{case.outcome['restarts']} restarts in outcome.json")
        case.causes += found

    return act


row("rank 1 raises an exception")(ends([fault("raise", "step", 25, 1)], f"^rank 1 crashed: {BOOM}$"))
row("rank 0 raises an exception; restarted")(restarts([fault("raise", "step", 25)], [f"^{BOOM}$"]))
row("rank 1 raises an exception 15 steps after each of three starts; restarted 3 ×")(
    restarts([fault("raise", "step", 15, 1, restart) for restart in range(3)], [f"^{BOOM}$"] * 3)
)


@row("rank 1 raises an exception at the same step of each start, max_restarts=10: restarted once")
def no_progress(case: Case, _: References) -> None:
    always = [fault("raise", "step", 25, 1), *(fault("raise", "step", 5, 1, restart) for restart in range(1, 10))]
    command = case.start("cluster.max_restarts=10", faults=always)
    case.crashed(command, f"^rank 1 crashed: {BOOM}; not started again, since the last start got no further")
    case.event("restart", cause=f"^{BOOM}$")
    case.goes_on()


row("SIGKILL of rank 1")(ends([fault("SIGKILL", "step", 25, 1)], "^rank 1 crashed: killed by SIGKILL"))
row("SIGKILL of rank 0; restarted")(restarts([fault("SIGKILL", "step", 25)], ["^killed by SIGKILL"]))
row("SIGSEGV of rank 1; restarted")(restarts([fault("SIGSEGV", "step", 25, 1)], ["^killed by SIGSEGV"]))
row("SIGKILL of a DataLoader's worker of rank 1")(
    ends(
        [fault("SIGKILL", "fetch", 200, 1)],
        r"^rank 1 crashed: DataLoader worker \(pid \d+\) is killed by signal: Killed",
        "data.workers=1",
    )
)


@row("rank 1 of torchrun raises an exception, --max-restarts=1; restarted")
def torchrun_restarts(case: Case, _: References) -> None:
    case.finished(case.start(by=(*TWO, "--max-restarts=1"), faults=[fault("raise", "step", 25, 1)]))
    case.causes.append(case.event("restart", cause=BOOM)["cause"])


@row("SIGKILL of rank 1 of torchrun; goes on by python launch.py")
def torchrun_killed(case: Case, _: References) -> None:
    case.crashed(case.start(by=TWO, faults=[fault("SIGKILL", "step", 25, 1)]), "^no word from rank 1 ")
    case.goes_on()


@row("SIGKILL of the launcher")
def launcher_killed(case: Case, _: References) -> None:
    command = case.start(DELAY_S="0.2")  # so that an orphan would still be there when they are counted
    case.await_step(12)
    command.send("SIGKILL")
    case.ended(command, None, -9)
    case.goes_on()
    case.found_dead()


@row("SIGKILL of all processes", "3 → 2")
def all_killed(case: Case, _: References) -> None:
    command = case.start("cluster.gpus_per_node=3", **SLOWLY)
    case.await_step(25)
    command.kill(command.everyone())
    case.ended(command, None, -9)
    case.goes_on_elsewhere()
    case.found_dead()


@row("SIGKILL of all processes in a save, twice")
def killed_in_a_save(case: Case, _: References) -> None:
    for number in (1, 2):
        command = case.start(**SLOWLY)
        case.await_start(number)
        send_in_a_save(case, partial(command.kill, command.everyone()))
        case.ended(command, None, -9)
        check(case.saving(), "the save was over before the signal came")
    case.goes_on()
    case.found_dead()
    check(not case.saving(), "what was half-written is still there")


@row("a second launch while the first one works, and another one when that was killed (SIGKILL of its launcher)")
def second_launch(case: Case, _: References) -> None:
    first = case.start(DELAY_S="0.3")
    case.await_step(12)
    second = case.start()
    check(second.code() == 2, f"the second launch wasn't refused: {second.said}")
    named = re.search(r"another launch works in .*\(host (\S+), pid (\d+), since [\d-]+ [\d:]+\)", second.said)
    true = named and named[1] == os.uname().nodename and int(named[2]) in processes_of(case.run)
    check(true, f"it doesn't name the first: {second.said}")
    check(case.outcome["state"] == "running", f"{case.outcome}")
    case.ends.append("refused, 2")
    case.causes.append(second.said.strip().removeprefix("isobatch: "))
    first.send("SIGKILL")
    case.ended(first, None, -9)
    case.goes_on()
    case.found_dead()


section("Hanging, memory, numbers")


def hangs(what: Fault, cause: str, case: Case, _: References) -> None:
    """A restart within the time, and the stacks of all ranks."""
    command = case.start("cluster.max_restarts=1", f"cluster.timeout_s={TIMEOUT_S}", faults=[what])
    case.await_step(24)
    began = time.monotonic()
    wait_until(lambda: case.events("restart"), "the restart")
    took = time.monotonic() - began
    check(took < NOTICED_S, f"found after {took:.1f} s")
    case.finished(command)
    case.causes.append(case.event("restart", cause=cause, rank=1)["cause"])
    for rank in (0, 1):
        log = (case.run / f"logs/rank-{rank}.log").read_text()
        check("most recent call first" in log, f"no stacks of rank {rank}")


row(f"rank 1 hangs (sleeps), cluster.timeout_s={TIMEOUT_S}; restarted")(
    partial(
        hangs, fault("hang", "step", 25, 1), r"^it hung: no progress within cluster.timeout_s=4 \(task\.py:\d+ in do\)"
    )
)
row(f"SIGSTOP of rank 1, cluster.timeout_s={TIMEOUT_S}; restarted")(
    partial(hangs, fault("SIGSTOP", "step", 25, 1), r"^suspended \(by SIGSTOP")
)


@row("memory runs out on rank 1 (RLIMIT_AS); restarted with half the per-GPU batch")
def out_of_memory(case: Case, _: References) -> None:
    case.exact = False  # another cut
    limits = [fault("memory", "step", 25, 1), fault("memory", "data", 1, 1, restart=1)]
    command = case.finished(case.start(faults=limits))
    restart = case.event("restart", kind="oom", rank=1, per_gpu_before=16, per_gpu=8, cause="an't allocate memory")
    case.causes.append(restart["cause"])
    check("per_gpu=8" in command.said, f"it isn't said: {command.said}")
    check(re.search(r"finished after .*per.GPU", command.said), f"the summary doesn't say it: {command.said}")


row("the loss of rank 1 is NaN, on_nonfinite=stop, max_restarts=3: not restarted")(
    ends([fault("nan", "step", 25, 1)], r"^step 25 \(.*\) isn't finite", "cluster.max_restarts=3")
)


@row("the loss of rank 1 is NaN, on_nonfinite=skip; then TERM", reference="skipping")
def skips(case: Case, references: References) -> None:
    """Compared with a run on one rank in which the same step was skipped; and is no run in which none was."""
    case.exact = False
    both = [fault("nan", "step", 30, 1), signalled("SIGTERM", "step", 40)]
    case.stopped(case.start("on_nonfinite=skip", faults=both), "SIGTERM")
    case.goes_on("on_nonfinite=skip")
    case.causes.append(case.event("skip", step=30, skipped=1, text="^step 30 .* isn't finite.*skipped")["text"])
    check([line["skipped"] for line in case.metrics() if "skipped" in line] == [1] * 18, "it isn't counted")
    check(case.apart(references("plain")) > 1e-4, "nothing was skipped")
