"""Test lost nodes and crashes: which jobs are requeued, which aren't, and which causes are recorded."""

from __future__ import annotations

import os
import signal

from tests.cluster.jobs import JobCase, on_nodes
from tests.cluster.lab import run
from tests.faults.case import check, wait_until
from tests.faults.task import fault

SLOWLY = {"DELAY_S": "0.15"}


@on_nodes(2)
def test_run_resumes_after_the_first_node_goes_down(case: JobCase) -> None:
    """The first node runs the job's script and hosts the rendezvous."""
    lose_node(case, case.nodes[0])


@on_nodes(2)
def test_run_resumes_after_another_node_goes_down(case: JobCase) -> None:
    lose_node(case, case.nodes[1])


@on_nodes(2)
def test_run_resumes_after_a_node_vanishes(case: JobCase) -> None:
    """The lost node's connections stay open, so the other nodes wait until Slurm notices."""
    lose_node(case, case.nodes[1], vanishes=True)


def lose_node(case: JobCase, node: str, vanishes: bool = False) -> None:
    """Check that Slurm requeues the job, and that the run resumes from its last checkpoint without counting a crash."""
    job = case.submit("cluster.max_requeues=0", **SLOWLY)
    case.await_step(12)
    (case.lab.freeze_node if vanishes else case.lab.kill_node)(node)
    bring_back(case, node)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    case.event("requeue", job=job, kind="node", cause=f"^node {node} (is down|went down and came back)$")
    check(case.event("going_on")["step"] >= 10, "the run restarted from step 0")


def bring_back(case: JobCase, node: str) -> None:
    """Restart a machine after Slurm has noticed that it is down."""
    wait_until(lambda: "State=DOWN" in run("scontrol", "show", "node", node), f"the end of {node}", poll_s=0.2)
    case.lab.kill_node(node)
    case.lab.start_node(node)


@on_nodes(2)
def test_job_waits_for_a_node_that_was_already_down(case: JobCase) -> None:
    """Slurm hasn't noticed that the node is down, and allocates it to the job."""
    node = case.nodes[1]
    case.lab.kill_node(node)
    job = case.submit()
    bring_back(case, node)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    tries = case.events("requeue")
    check(tries, "the job wasn't requeued")
    for event in tries:
        check((event["kind"], event["cause"]) == ("node", f"node {node} can't be reached"), f"{event}")


@on_nodes(2)
def test_a_node_that_does_not_sign_in_is_named(case: JobCase) -> None:
    """The other node stops waiting after the timeout, and no process remains."""
    node = case.nodes[1]
    job = case.submit("cluster.timeout_s=10")
    wait_until(lambda: case.lab.tasks_of(node), f"the launcher on {node}", poll_s=0.002)
    for pid in case.lab.tasks_of(node):
        os.kill(pid, signal.SIGSTOP)
    state = case.await_end(job)
    check(state == "FAILED", f"the job is {state}")
    missing = f"no word from {node} of {', '.join(case.nodes)} within 10 s"
    case.event("not_requeued", job=job, cause=f"before the run started: the machines didn't meet at .*: {missing}")
    wait_until(lambda: not case.lab.tasks_of(node), f"remaining processes on {node} to end", 30)
    case.expect_finish(case.submit())
    case.expect_same("2 ranks")


@on_nodes(2)
def test_a_crash_does_not_loop(case: JobCase) -> None:
    """The job is requeued once, since it gets no further the second time."""
    job = case.submit("cluster.max_requeues=9", faults=[fault("raise", "step", 5, 1)])
    state = case.await_end(job)
    check((state, case.outcome["state"]) == ("FAILED", "crashed"), f"{state}, {case.outcome}")
    boom = r"rank 1 crashed: ValueError: boom \(task\.py:\d+ in do\)"
    case.event("requeue", job=job, kind="crash", cause=f"^{boom}$", step=4)
    case.event("not_requeued", job=job, kind="crash", cause=f"^{boom}; it got no further than step 4, as before$")
    check(len(case.events("crashed")) == len(case.events("start")) == 2, "the job was started more than twice")
    case.expect_finish(case.submit())
    case.expect_same("2 ranks")


@on_nodes(2)
def test_a_crash_that_gets_further_is_requeued_up_to_max_requeues(case: JobCase) -> None:
    job = case.submit("cluster.max_requeues=2", faults=[fault("raise", "step", 13, 1)])
    state = case.await_end(job)
    check((state, case.outcome["state"]) == ("FAILED", "crashed"), f"{state}, {case.outcome}")
    steps = [(event["kind"], event["step"]) for event in case.events("requeue")]
    check(steps == [("crash", 12), ("crash", 22)], f"requeued at {steps}")
    case.event("not_requeued", job=job, kind="crash", cause="; already requeued cluster.max_requeues=2 times$", step=32)
    case.expect_finish(case.submit())
    case.expect_same("2 ranks")


@on_nodes(2)
def test_a_later_start_that_is_refused_is_not_requeued(case: JobCase) -> None:
    """Slurm's message about an earlier start isn't attributed to the later one."""
    job = case.submit(**SLOWLY)
    case.await_step(12)
    run("scontrol", "requeue", job)
    wait_until(lambda: case.events("requeue"), "the job to be requeued")
    away = (case.run / "checkpoints").rename(case.folder / "away")
    state = case.await_end(job)
    check((state, case.outcome["state"]) == ("FAILED", "refused"), f"{state}, {case.outcome}")
    case.event("not_requeued", job=job, cause="checkpoints has no checkpoint")
    away.rename(case.run / "checkpoints")
    case.expect_finish(case.submit())
    case.expect_same("2 ranks")
