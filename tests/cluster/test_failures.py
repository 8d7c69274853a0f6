"""Lost nodes and crashes: which jobs resume, which don't, and the recorded causes."""

from __future__ import annotations

import os
import signal

from tests.cluster.jobs import JobCase, on_nodes
from tests.cluster.lab import run
from tests.faults.case import check, wait_until
from tests.faults.task import fault

SLOWLY = {"DELAY_S": "0.15"}


@on_nodes(2)
def test_the_first_node_goes_down(case: JobCase) -> None:
    """It runs the job's script and hosts the rendezvous."""
    loses(case, case.nodes[0])


@on_nodes(2)
def test_another_node_goes_down(case: JobCase) -> None:
    loses(case, case.nodes[1])


@on_nodes(2)
def test_a_node_vanishes(case: JobCase) -> None:
    """Its connections stay open, so the other nodes wait until Slurm notices."""
    loses(case, case.nodes[1], vanishes=True)


def loses(case: JobCase, node: str, vanishes: bool = False) -> None:
    """Slurm requeues the job, and the run resumes from its last checkpoint. It doesn't count as a crash."""
    job = case.submit("cluster.max_requeues=0", **SLOWLY)
    case.await_step(12)
    (case.lab.freeze_node if vanishes else case.lab.kill_node)(node)
    comes_back(case, node)
    case.finishes(job)
    case.same("2 ranks")
    case.event("requeue", job=job, kind="node", cause=f"^node {node} (is down|went down and came back)$")
    check(case.event("going_on")["step"] >= 10, "it restarted from step 0")


def comes_back(case: JobCase, node: str) -> None:
    """Restart a machine, once Slurm has noticed that it was down."""
    wait_until(lambda: "State=DOWN" in run("scontrol", "show", "node", node), f"the end of {node}", poll_s=0.2)
    case.lab.kill_node(node)
    case.lab.start_node(node)


@on_nodes(2)
def test_a_node_that_was_down_already(case: JobCase) -> None:
    """Slurm hasn't noticed, and allocates it to the job."""
    node = case.nodes[1]
    case.lab.kill_node(node)
    job = case.submit()
    comes_back(case, node)
    case.finishes(job)
    case.same("2 ranks")
    tries = case.events("requeue")
    check(tries, "the job wasn't requeued")
    for event in tries:
        check((event["kind"], event["cause"]) == ("node", f"node {node} can't be reached"), f"{event}")


@on_nodes(2)
def test_a_node_that_does_not_sign_in(case: JobCase) -> None:
    """It is named, the other node stops waiting after the timeout, and no process is left."""
    node = case.nodes[1]
    job = case.submit("cluster.timeout_s=10")
    wait_until(lambda: case.lab.tasks_of(node), f"the launcher on {node}", poll_s=0.002)
    for pid in case.lab.tasks_of(node):
        os.kill(pid, signal.SIGSTOP)
    state = case.await_over(job)
    check(state == "FAILED", f"it is {state}")
    missing = f"no word from {node} of {', '.join(case.nodes)} within 10 s"
    case.event("not_requeued", job=job, cause=f"before the run started: the machines didn't meet at .*: {missing}")
    wait_until(lambda: not case.lab.tasks_of(node), f"processes that are left on {node}", 30)
    case.finishes(case.submit())
    case.same("2 ranks")


@on_nodes(2)
def test_a_crash_does_not_loop(case: JobCase) -> None:
    """The job is requeued once, and gets no further."""
    job = case.submit("cluster.max_requeues=9", faults=[fault("raise", "step", 5, 1)])
    state = case.await_over(job)
    check((state, case.outcome["state"]) == ("FAILED", "crashed"), f"{state}, {case.outcome}")
    boom = r"rank 1 crashed: ValueError: boom \(task\.py:\d+ in do\)"
    case.event("requeue", job=job, kind="crash", cause=f"^{boom}$", step=4)
    case.event("not_requeued", job=job, kind="crash", cause=f"^{boom}; it got no further than step 4, as before$")
    check(len(case.events("crashed")) == len(case.events("start")) == 2, "it was tried more than twice")
    case.finishes(case.submit())
    case.same("2 ranks")


@on_nodes(2)
def test_a_crash_that_gets_further_is_queued_again_so_many_times(case: JobCase) -> None:
    job = case.submit("cluster.max_requeues=2", faults=[fault("raise", "step", 13, 1)])
    state = case.await_over(job)
    check((state, case.outcome["state"]) == ("FAILED", "crashed"), f"{state}, {case.outcome}")
    steps = [(event["kind"], event["step"]) for event in case.events("requeue")]
    check(steps == [("crash", 12), ("crash", 22)], f"requeued at {steps}")
    case.event("not_requeued", job=job, kind="crash", cause="; already requeued cluster.max_requeues=2 times$", step=32)
    case.finishes(case.submit())
    case.same("2 ranks")


@on_nodes(2)
def test_a_later_start_that_is_refused_is_not_queued_again(case: JobCase) -> None:
    """Slurm's message about an earlier start isn't attributed to it."""
    job = case.submit(**SLOWLY)
    case.await_step(12)
    run("scontrol", "requeue", job)
    wait_until(lambda: case.events("requeue"), "the job to be requeued")
    away = (case.run / "checkpoints").rename(case.folder / "away")
    state = case.await_over(job)
    check((state, case.outcome["state"]) == ("FAILED", "refused"), f"{state}, {case.outcome}")
    case.event("not_requeued", job=job, cause="checkpoints has no checkpoint")
    away.rename(case.run / "checkpoints")
    case.finishes(case.submit())
    case.same("2 ranks")
