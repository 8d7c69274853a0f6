"""Test that stopped jobs resume by themselves, lose nothing, and record the true cause."""

from __future__ import annotations

import re

from tests.cluster.jobs import JobCase, field, on_nodes
from tests.cluster.lab import run
from tests.faults.case import STEPS, check, wait_until
from tests.faults.task import fault

SLOWLY = {"DELAY_S": "0.15"}


@on_nodes(2)
def test_a_job_equals_a_run_on_one_machine(case: JobCase) -> None:
    """Two nodes with two workers each give the same bits as one machine with four."""
    job = case.submit("cluster.gpus_per_node=2")
    case.expect_finish(job)
    case.expect_same("4 ranks")
    case.event("submitted", job=job)
    case.event("start", job=job, job_restart=0, hosts=list(case.nodes), world_size=4)
    case.event("finished", step=STEPS)
    check(field(job, "ExitCode") == "0:0", f"the job ended with {field(job, 'ExitCode')}")
    before, attempt = case.events(), case.outcome["attempt"]
    run("scontrol", "requeue", job)
    wait_until(lambda: field(job, "Restarts") == "1", "the job to start again")
    case.expect_finish(job)
    check((case.events(), case.outcome["attempt"]) == (before, attempt), "the finished run trained again")


@on_nodes(2)
def test_run_resumes_where_slurm_requeues_a_preempted_job(case: JobCase) -> None:
    preempt(case, "main")


@on_nodes(2)
def test_run_resumes_where_slurm_cancels_a_preempted_job(case: JobCase) -> None:
    preempt(case, "cheap")


@on_nodes(2)
def test_run_resumes_after_preemption_with_a_grace_time(case: JobCase) -> None:
    preempt(case, "graceful")


def preempt(case: JobCase, partition: str) -> None:
    job = case.submit(f"cluster.partition={partition}", "cluster.extra=[--exclusive]", **SLOWLY)
    case.await_step(12)
    take_nodes(case)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    check_requeued(case, "^preempted: a job with a higher priority took its place$")


@on_nodes(2)
def test_a_job_killed_before_it_saved_resumes_from_the_last_checkpoint(case: JobCase) -> None:
    """Two hanging ranks can't stop. After Slurm has killed them, the cause is recorded, and some steps are repeated."""
    hang = [fault("hang", "step", 30, rank) for rank in (0, 1)]  # after the checkpoint of step 20, and never again
    job = case.submit("cluster.extra=[--exclusive]", faults=hang)
    case.await_step(29)
    take_nodes(case)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    cause = "^preempted: a job with a higher priority took its place; it was killed before the run was saved$"
    case.event("requeue", kind="stop", cause=cause, job=job, step=29)
    case.event("crashed", cause="^ended without recording a cause", found=True)
    case.event("going_on", step=20)


def take_nodes(case: JobCase) -> None:
    """Submit a short job with a higher priority on this case's nodes."""
    nodes = (f"--nodes={len(case.nodes)}", f"--nodelist={','.join(case.nodes)}", "--exclusive", "--output=/dev/null")
    run("sbatch", "--partition=high", *nodes, "--wrap=true")


def check_requeued(case: JobCase, cause: str, times: int | None = 1) -> None:
    """Check that the run stopped, was saved, was requeued for ``cause``, and resumed at the same step."""
    stops, requeues, resumes = (case.events(name) for name in ("stopped", "requeue", "going_on"))
    check(len(stops) == times or (times is None and stops), f"{len(stops)} stops")
    steps = [event["step"] for event in stops]
    check(steps == [event["step"] for event in requeues], f"stopped at {steps}, and requeued: {requeues}")
    check(steps == [event["step"] for event in resumes], f"stopped at {steps}, and resumed: {resumes}")
    for event in requeues:
        check(event["kind"] == "stop" and re.search(cause, event["cause"]), f"{event}")
    (submitted,) = case.events("submitted")
    starts = [(event["job"], event["job_restart"]) for event in case.events("start")]
    check(starts == [(submitted["job"], number) for number in range(len(stops) + 1)], f"starts: {starts}")


@on_nodes(2)
def test_run_resumes_after_its_time_limit(case: JobCase) -> None:
    """Slurm signals up to 30 s too early: 80 to 110 s after the start, of which a slow machine needs 30 to start.

    The run takes at least 110 s.
    """
    job = case.submit("cluster.time_min=2", "cluster.signal_s=10", DELAY_S="2.3")
    case.expect_finish(job)
    case.expect_same("2 ranks")
    check_requeued(case, "^its time limit$", times=None)


@on_nodes(2)
def test_run_resumes_after_its_time_limit_without_an_early_signal(case: JobCase) -> None:
    """The run saves in the time between TERM and KILL."""
    job = case.submit("cluster.time_min=1", "cluster.signal_s=0", DELAY_S="1.5")
    case.expect_finish(job)
    case.expect_same("2 ranks")
    check_requeued(case, "^its time limit$", times=None)


@on_nodes(2)
def test_run_resumes_after_scontrol_requeue(case: JobCase) -> None:
    job = case.submit(**SLOWLY)
    case.await_step(12)
    run("scontrol", "requeue", job)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    check_requeued(case, "^`scontrol requeue`$")


@on_nodes(2)
def test_run_resumes_after_a_signal_by_scancel(case: JobCase) -> None:
    job = case.submit(**SLOWLY)
    case.await_step(12)
    run("scancel", "--signal=USR2", job)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    check_requeued(case, "^SIGUSR2, for example from `scancel --signal`$")


@on_nodes(2)
def test_run_resumes_after_a_signal_before_training(case: JobCase) -> None:
    job = case.submit()
    wait_until(lambda: len(case.lab.tasks_of(case.nodes[1])) == 1, "the other node's launcher", poll_s=0.002)
    run("scancel", "--signal=USR2", job)
    case.expect_finish(job)
    case.expect_same("2 ranks")
    case.event("requeue", job=job, kind="stop", cause="^(a signal|SIGUSR2), for example from `scancel --signal`$")
    check(not case.events("crashed"), "the stop counts as a crash")


@on_nodes(2)
def test_a_cancelled_job_is_not_requeued(case: JobCase) -> None:
    """The same command resumes the run."""
    job = case.submit(**SLOWLY)
    case.await_step(12)
    run("scancel", job)
    state = case.await_end(job)
    check(state == "CANCELLED", f"the job is {state}")
    step = case.event("stopped")["step"]
    wait_until(lambda: case.events("cancelled"), "the event", 20)
    case.event("cancelled", job=job, cause="^`scancel`$", step=step)
    check(not case.events("requeue"), "the job was requeued")
    case.expect_finish(case.submit())
    case.expect_same("2 ranks")
    case.event("going_on", step=step)
