"""Define rows of the fault table: processes that fail, die or hang."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from functools import partial

from benchmarks.soak import processes_of
from tests.faults.case import LAUNCH, SLOWLY, STEPS, TWO, Case, Command, check, wait_until
from tests.faults.stops import send_in_a_save, two_machines
from tests.faults.table import NORM, Act, References, row, section, signalled
from tests.faults.task import Fault, fault
from tests.support.noflock import without_flock

TIMEOUT_S = 4
HUNG = rf"^it hung: no progress within cluster\.timeout_s={TIMEOUT_S} \(task\.py:\d+ in do\)"
NOTICED_S = TIMEOUT_S + 3 + 3  # 3 s for ranks to report what they know, and 3 s for a busy machine
LOADER_KILLED = r"DataLoader worker \(pid \d+\) is killed by signal: Killed"
BOOM = r"ValueError: boom \(task\.py:\d+ in do\)"

section("Crashes")


def crashes(faults: list[Fault], cause: str, *overrides: str) -> Act:
    """Return an act: the command ends as ``crashed``, and the same command resumes."""

    def act(case: Case, _: References) -> None:
        case.expect_crash(case.start(*overrides, faults=faults), cause)
        case.run_to_end(*overrides)

    return act


def restarts(faults: list[Fault], causes: list[str], *overrides: str) -> Act:
    """Return an act: the command restarts its workers once for each cause, and finishes."""

    def act(case: Case, _: References) -> None:
        case.expect_recovery(case.start(*overrides, f"cluster.max_restarts={len(causes)}", faults=faults))
        found = [event["cause"] for event in case.events("restart")]
        check(len(found) == len(causes), f"restarts for {found}, not for {causes}")
        for recorded, cause in zip(found, causes, strict=True):
            check(re.search(cause, recorded), f"restart for {recorded!r}, not {cause!r}")
        check(case.outcome["restarts"] == len(causes), f"{case.outcome['restarts']} restarts in outcome.json")
        case.causes += found

    return act


row("rank 1 raises an exception", everywhere=True)(
    crashes([fault("raise", "step", 25, 1)], f"^rank 1 crashed: {BOOM}$")
)
row("rank 0 raises an exception; restarted")(restarts([fault("raise", "step", 25)], [f"^{BOOM}$"]))
row("rank 1 raises an exception 15 steps after each of three starts; restarted 3 ×")(
    restarts([fault("raise", "step", 15, 1, restart) for restart in range(3)], [f"^{BOOM}$"] * 3)
)


@row("rank 1 raises an exception at the same step of each start, max_restarts=10: restarted once")
def no_progress(case: Case, _: References) -> None:
    always = [fault("raise", "step", 25, 1), *(fault("raise", "step", 5, 1, restart) for restart in range(1, 10))]
    command = case.start("cluster.max_restarts=10", faults=always)
    case.expect_crash(command, f"^rank 1 crashed: {BOOM}; not restarted, since the last start got no further")
    case.event("restart", cause=f"^{BOOM}$")
    case.run_to_end()


row("SIGKILL of rank 1")(crashes([fault("SIGKILL", "step", 25, 1)], "^rank 1 crashed: killed by SIGKILL"))
row("SIGKILL of rank 0; restarted", everywhere=True)(restarts([fault("SIGKILL", "step", 25)], ["^killed by SIGKILL"]))
row("SIGSEGV of rank 1; restarted")(restarts([fault("SIGSEGV", "step", 25, 1)], ["^killed by SIGSEGV"]))
row("SIGKILL of a DataLoader's worker of rank 1")(
    crashes([fault("SIGKILL", "fetch", 200, 1)], f"^rank 1 crashed: {LOADER_KILLED}", "data.workers=1")
)


row("SIGKILL of a DataLoader's worker of rank 1; restarted")(
    restarts([fault("SIGKILL", "fetch", 200, 1)], [LOADER_KILLED], "data.workers=1")
)


@row("a rank of one of two machines raises an exception; both are restarted together", "2 × 1 → 2 × 1")
def machines_restart(case: Case, _: References) -> None:
    case.exact = False  # a rank that has its machine to itself uses more threads
    for machine in two_machines(case, "cluster.max_restarts=1", faults=[fault("raise", "step", 25, 1)]):
        case.expect_recovery(machine)
    case.causes.append(case.event("restart", cause=f"^{BOOM}$", rank=1)["cause"])


@row("rank 1 of torchrun raises an exception, --max-restarts=1; restarted")
def torchrun_restarts(case: Case, _: References) -> None:
    case.expect_recovery(case.start(by=(*TWO, "--max-restarts=1"), faults=[fault("raise", "step", 25, 1)]))
    case.causes.append(case.event("restart", cause=BOOM)["cause"])


@row("SIGKILL of rank 1 of torchrun; resumed by python launch.py")
def torchrun_killed(case: Case, _: References) -> None:
    case.expect_crash(case.start(by=TWO, faults=[fault("SIGKILL", "step", 25, 1)]), "^no word from rank 1 ")
    case.run_to_end()


@row("SIGKILL of the launcher", everywhere=True)
def launcher_killed(case: Case, _: References) -> None:
    command = case.start(DELAY_S="0.2")  # an orphan would still run when orphans are counted
    case.await_step(12)
    command.send("SIGKILL")
    case.expect_end(command, None, -9)
    case.run_to_end()
    case.expect_found_dead()


@row("SIGKILL of the launcher, whose task has forked a process that lives on")
def task_forked(case: Case, _: References) -> None:
    command = case.start(faults=[fault("fork", "data")], **SLOWLY)
    case.await_step(12)
    command.send("SIGKILL")
    check(command.exit_code() == -signal.SIGKILL, "the launcher ended by itself")
    wait_until(lambda: len(processes_of(case.run)) == 1, "the workers to end")
    (forked,) = processes_of(case.run)
    second = case.start()
    wait_until(lambda: len(case.events("start")) == 2 or second.process.poll() is not None, "the next start")
    os.kill(forked, signal.SIGKILL)
    case.expect_end(second, "finished", 0)
    case.expect_found_dead()


@row("SIGKILL of the launcher while the data is opened; resumed from the folder alone")
def killed_before_it_trained(case: Case, _: References) -> None:
    case.expect_end(case.start(faults=[signalled("SIGKILL", "data")]), None, -9)
    case.run_to_end(base=())
    case.expect_found_dead()


@row("SIGKILL of all processes", "3 → 2", everywhere=True)
def all_killed(case: Case, _: References) -> None:
    command = case.start("cluster.gpus_per_node=3", **SLOWLY)
    case.await_step(25)
    command.kill(command.pids())
    case.expect_end(command, None, -9)
    case.resume_elsewhere()
    case.expect_found_dead()


@row("SIGKILL of all processes in a save, twice")
def killed_in_a_save(case: Case, _: References) -> None:
    for number in (1, 2):
        command = case.start(**SLOWLY)
        case.await_start(number)
        send_in_a_save(case, partial(command.kill, command.pids()))
        case.expect_end(command, None, -9)
        check(case.saving(), "the save was over before the signal came")
    case.run_to_end()
    case.expect_found_dead()
    check(not case.saving(), "a half-written checkpoint still exists")


@row("a second launch while the first one runs, and a third after SIGKILL of the first one's launcher")
def second_launch(case: Case, _: References) -> None:
    first = case.start(DELAY_S="0.3")
    case.await_step(12)
    refuse_second(case, first)
    first.send("SIGKILL")
    case.expect_end(first, None, -9)
    case.run_to_end()
    case.expect_found_dead()


@row("a second launch between two starts of the first one's workers (SIGSTOP of its launcher, SIGKILL of all of them)")
def second_launch_between_starts(case: Case, _: References) -> None:
    first = case.start("cluster.max_restarts=1", **SLOWLY)
    case.await_step(25)
    first.send("SIGSTOP")
    first.kill(set(first.pids()) - {first.process.pid})
    refuse_second(case, first)
    first.send("SIGCONT")
    case.expect_recovery(first)
    case.causes.append(case.event("restart", cause="^killed by SIGKILL")["cause"])


@row("a second launch where flock excludes nobody (LD_PRELOAD), and a third after `lock` is removed too")
def second_launch_without_flock(case: Case, _: References) -> None:
    env = without_flock(case.folder)
    first = case.start(DELAY_S="1", **env)
    case.await_step(12)
    refuse_second(case, first, **env)
    (case.run / "lock").unlink()
    refuse_second(case, first, **env)
    first.send("SIGKILL")
    case.expect_end(first, None, -9)
    case.run_to_end(**env)
    case.expect_found_dead()


@row("the run directory is renamed in mid-run, and renamed back after the run has ended")
def renamed(case: Case, _: References) -> None:
    command, away = case.start(**SLOWLY), case.folder / "away"
    case.await_step(25)
    case.run.rename(away)
    command.exit_code()
    check(not case.run.exists(), "the run directory was created again")
    away.rename(case.run)
    case.expect_crash(command, f"^run directory {case.run} was moved to {away} during the run$")
    case.causes[-1] = case.causes[-1].replace(str(away), "AWAY")
    case.run_to_end()


def refuse_second(case: Case, first: Command, **env: str) -> None:
    """Check that a second launch is refused and names the first."""
    second = case.start(**env)
    check(second.exit_code() == 2, f"the second launch wasn't refused: {second.printed}")
    named = re.search(r"another launch works in .*\(host (\S+), pid (\d+), since [\d-]+ [\d:]+\)", second.printed)
    correct = named and named[1] == os.uname().nodename and int(named[2]) == first.process.pid
    check(correct, f"the second launch doesn't name the first, pid {first.process.pid}: {second.printed}")
    check(case.outcome["state"] == "running", f"{case.outcome}")
    case.ends.append("refused, 2")
    case.causes.append(second.printed.strip().removeprefix("isobatch: "))


def best_is_kept(direction: str, case: Case, _: References) -> None:
    keep_best = ("checkpoint.keep=1", f"checkpoint.best=val/loss:{direction}")
    for number, until in enumerate((12, 24, 36), 1):
        command = case.start(*keep_best, **SLOWLY)
        case.await_start(number)
        case.await_step(until)
        send_in_a_save(case, partial(command.kill, command.pids()))
        case.expect_end(command, None, -9)
    case.run_to_end(*keep_best)
    case.expect_found_dead()
    losses = {line["step"]: line["val/loss"] for line in case.metrics() if "val/loss" in line}
    best = f"step-{(max if direction == 'max' else min)(losses, key=lambda step: losses[step]):08}"
    linked = os.readlink(case.run / "checkpoints/best")
    check(linked == best, f"best is {linked}, not {best}: {losses}")
    kept = [path.name for path in case.checkpoints()]
    check(kept == sorted({best, f"step-{STEPS:08}"}), f"kept: {kept}")


for direction in ("max", "min"):
    row(f"SIGKILL of all processes in three saves; checkpoint.keep=1, checkpoint.best=val/loss:{direction}")(
        partial(best_is_kept, direction)
    )


section("Hanging, memory, numbers")


def hangs(hang: Fault, step: int, cause: str, case: Case, _: References) -> None:
    """Check that workers are restarted soon after the hang in ``step``, and that all ranks log their stacks."""
    command = case.start("cluster.max_restarts=1", f"cluster.timeout_s={TIMEOUT_S}", faults=[hang])
    case.await_start(1)
    case.await_step(step)
    began = time.monotonic()
    wait_until(lambda: case.events("restart"), "the restart")
    took = time.monotonic() - began
    check(took < NOTICED_S, f"the hang was noticed after {took:.1f} s")
    case.expect_recovery(command)
    case.causes.append(case.event("restart", cause=cause, rank=1)["cause"])
    for rank in (0, 1):
        log = (case.run / f"logs/rank-{rank}.log").read_text()
        check("most recent call first" in log, f"no stacks of rank {rank}")


for at, call, step, where in (
    ("step", 25, 24, "in mid-step"),
    ("fetch", 24 * 16 + 1, 24, "in its dataset's [index]"),
    ("evaluation", 5, 21, "in an evaluation"),
    ("model", 1, 0, "while its model is built"),
):
    row(f"rank 1 hangs (sleeps) {where}, cluster.timeout_s={TIMEOUT_S}; restarted", everywhere=at == "step")(
        partial(hangs, fault("hang", at, call, 1), step, HUNG)
    )
row(f"SIGSTOP of rank 1, cluster.timeout_s={TIMEOUT_S}; restarted")(
    partial(hangs, fault("SIGSTOP", "step", 25, 1), 24, r"^suspended \(by SIGSTOP")
)


@row(f"final/ takes {3 * TIMEOUT_S} s to write, cluster.timeout_s={TIMEOUT_S}: not taken for a hang")
def slow_end(case: Case, _: References) -> None:
    slow = fault("slow", "data", seconds=3 * TIMEOUT_S)
    case.expect_recovery(case.start(f"cluster.timeout_s={TIMEOUT_S}", faults=[slow]))


@row(
    f"prepare(), train_data(), val_data() and summarise() take {2 * TIMEOUT_S} s each on one rank: not taken for hangs"
)
def slow_data(case: Case, _: References) -> None:
    places = {"prepare": 0, "data": 1, "validation": 0, "summarise": 1}
    slow = [fault("wait", at, rank=rank, seconds=2 * TIMEOUT_S) for at, rank in places.items()]
    case.counted = False  # each evaluation logs one more value
    case.expect_recovery(case.start(f"cluster.timeout_s={TIMEOUT_S}", faults=slow))


def out_of_memory(by: Iterable[str], at: str, call: int, case: Case, _: References) -> None:
    """Limit the memory from a call on, also after the restart, so that 16 samples don't fit but 8 do."""
    case.exact = False  # the restart uses another cut
    limits = [fault("memory", at, call, 1), fault("memory", "step", 1, 1, restart=1)]
    command = case.expect_recovery(case.start(by=by, faults=limits))
    restart = case.event("restart", kind="oom", rank=1, per_gpu_before=16, per_gpu=8, cause="an't allocate memory")
    case.causes.append(restart["cause"])
    check(re.search(r"finished after .*per.GPU batch 16 → 8", command.printed), f"not printed: {command.printed}")


for by, at, call, where in (
    (LAUNCH, "step", 25, ""),
    (LAUNCH, "evaluation", 5, " in an evaluation"),
    ((*TWO, "--max-restarts=1"), "step", 25, " of torchrun, --max-restarts=1"),
):
    row(f"memory runs out on rank 1{where} (RLIMIT_AS); restarted with half the per-GPU batch", everywhere=not where)(
        partial(out_of_memory, by, at, call)
    )


@row("memory runs out on rank 1 with 2 samples in a pass, then with 1 (RLIMIT_AS); resumed when there is more")
def no_memory_at_all(case: Case, _: References) -> None:
    case.exact = False  # the restart uses another cut
    limits = [
        fault("memory", "step", 24 * 8 + 1, 1, sample=1 << 30),
        fault("memory", "step", 1, 1, restart=1, sample=1 << 30),
    ]
    command = case.start("batch.per_gpu=2", faults=limits)
    cause = "^rank 1 ran out of memory with 1 sample in a pass: .*there is no smaller batch.per_gpu"
    case.expect_end(command, "oom", 1, cause)
    case.event("restart", kind="oom", rank=1, per_gpu_before=2, per_gpu=1)
    case.run_to_end("batch.per_gpu=2")


row("the loss of rank 1 is NaN, on_nonfinite=stop, max_restarts=3: not restarted")(
    crashes([fault("nan", "step", 25, 1)], r"^step 25 \(.*\) isn't finite", "cluster.max_restarts=3")
)


@row("the loss of rank 1 is NaN, on_nonfinite=skip; then TERM", reference="skipping", everywhere=True)
def skips(case: Case, references: References) -> None:
    """Compare with a run on one rank that skipped the same step, and check that a run without a skip differs."""
    case.exact = False
    both = [fault("nan", "step", 30, 1), signalled("SIGTERM", "step", 40)]
    case.expect_stop(case.start("on_nonfinite=skip", faults=both), "SIGTERM")
    case.run_to_end("on_nonfinite=skip")
    case.causes.append(case.event("skip", step=30, skipped=1, text="^step 30 .* isn't finite.*skipped")["text"])
    check([line["skipped"] for line in case.metrics() if "skipped" in line] == [1] * 18, "the skip isn't counted")
    check(case.distance(references("plain")) > 1e-4, "nothing was skipped")


@row(
    "the inputs of rank 0 are NaN, on_nonfinite=skip, a model with BatchNorm; then TERM",
    reference="skipping with BatchNorm",
    everywhere=True,
)
def skips_with_statistics(case: Case, _: References) -> None:
    """Compare with a run in which rank 1's loss was NaN at this step, since rank 0's statistics are the run's."""
    case.expect_stop(
        case.start(*NORM, faults=[fault("nan_inputs", "step", 30), signalled("SIGTERM", "step", 40)]), "SIGTERM"
    )
    case.run_to_end(*NORM)
    case.causes.append(case.event("skip", step=30, skipped=1)["text"])
    counted = int(case.weights()["model/1.num_batches_tracked"])
    check(counted == STEPS - 1, f"the running statistics cover {counted} steps")
