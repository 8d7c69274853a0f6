"""Test submitted jobs: rejections, quoting, sweeps, changed numbers of nodes, and scripts submitted by hand."""

from __future__ import annotations

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor

from isobatch.conf.overrides import override
from tests.cluster.jobs import ONE_THREAD, JobCase, field, has_ended, on_nodes
from tests.cluster.lab import run
from tests.cluster.test_stops import check_requeued, take_nodes
from tests.faults.case import BASE, ROOT, check, wait_until

SLOWLY = {"DELAY_S": "0.15"}


@on_nodes(4)
def test_a_sweep_is_an_array(case: JobCase) -> None:
    """Run three runs on one node each, two at a time. The last one, whose job id is the array's, is preempted."""
    peaks = ("0.05", "0.04", "0.03")
    where = ("cluster.nodes=1", "cluster.nodelist=null", "cluster.partition=cheap", "cluster.extra=[--exclusive]")
    more = ("cluster.gpus_per_node=2", "cluster.max_parallel=2")
    job = case.submit("-m", f"lr.peak={','.join(peaks)}", *where, *more, **SLOWLY)
    elements = {f"{job}_{number}": case.element(f"lr.peak={peak}") for number, peak in enumerate(peaks)}
    *others, last = elements
    at_once: set[int] = set()

    def running() -> set[str]:
        found = set(run("squeue", "-h", "-j", job, "-t", "RUNNING", "-o", "%i").split())
        at_once.add(len(found))
        return found

    wait_until(lambda: last in running() and len(elements[last].metrics()) >= 12, f"step 12 of {last}")
    elements[last].nodes = (field(last, "NodeList"),)
    take_nodes(elements[last])
    wait_until(lambda: not running() and all(has_ended(each) for each in elements), "the end of all jobs")
    check(max(at_once) == 2, f"{max(at_once)} at a time")
    for peak, (number, element) in zip(peaks, elements.items(), strict=True):
        element.expect_finish(number)
        element.expect_same(f"peak {peak}")
        element.event("submitted", job=f"^{number}$")
    check_requeued(elements[last], "^preempted: ")
    check([field(other, "Restarts") for other in others] == ["0", "0"], "other elements were requeued, too")


@on_nodes(4)
def test_a_run_resumes_on_other_numbers_of_nodes(case: JobCase) -> None:
    """Resume on one, two and four nodes, by the same command and by the run directory."""
    first, first_two = (f"cluster.nodelist={','.join(case.nodes[:count])}".replace(",", r"\,") for count in (1, 2))
    for step, given, base in ((12, ("cluster.nodes=1", first), BASE), (24, ("cluster.nodes=2", first_two), ())):
        job = case.submit(*given, base=base, **SLOWLY)
        case.await_step(step)
        run("scancel", job)
        case.await_end(job)
    case.expect_finish(case.submit(base=()))
    case.exact = False
    case.expect_same("2 ranks")
    check([event["world_size"] for event in case.events("start")] == [1, 2, 4], "the world sizes differ")
    check(len(case.events("cancelled")) == len(case.events("going_on")) == 2, "the run wasn't stopped twice")


@on_nodes(2)
def test_a_second_submission_is_rejected_and_names_the_job(case: JobCase) -> None:
    with ThreadPoolExecutor() as pool:
        both = [future.result() for future in [pool.submit(case.command, **SLOWLY) for _ in range(2)]]
    refused, submitted = sorted(both, key=lambda done: -done.returncode)
    check((refused.returncode, submitted.returncode) == (2, 0), f"{refused}, {submitted}")
    job = case.event("submitted")["job"]
    named = f"isobatch: job {job} already does the run in {case.run}"
    check(refused.stderr.startswith(named), f"the error doesn't name the first job: {refused.stderr}")
    case.await_step(1)
    third = case.command()
    check(third.returncode == 2 and third.stderr.startswith(f"{named} (RUNNING on n"), f"{third}")
    check(len(list(case.run.glob("submissions/*"))) == 2, "the rejected submission left a file")
    case.expect_finish(job)
    case.expect_same("2 ranks")


@on_nodes(2)
def test_errors_of_sbatch_are_quoted_with_a_fix(case: JobCase) -> None:
    for given, quote, hint in (
        (("cluster.partition=nowhere",), "invalid partition specified: nowhere", "`sinfo -s` lists the partitions"),
        (("cluster.nodes=9", "cluster.nodelist=null"), "More processors requested than permitted", "cluster.nodes"),
        (("cluster.constraint=gold",), "Invalid feature specification", "cluster.constraint"),
        (("cluster.mem_gb=9999",), "Memory specification can not be satisfied", "cluster.mem_gb"),
        (("cluster.extra=[--nonsense]",), "unrecognized option '--nonsense'", "cluster.extra"),
        (("cluster.time_min=600",), "Requested time limit is invalid", "cluster.time_min"),
    ):
        done = case.command(*given)
        check(done.returncode == 2, f"{given}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        check(done.stderr.startswith("isobatch: sbatch failed (") and quote in done.stderr, f"{given}: {done.stderr}")
        check(hint in done.stderr.splitlines()[-1], f"{given}: no hint in {done.stderr}")
        check("Traceback" not in done.stderr, done.stderr)
        check(not case.run.exists(), f"{given} left {list(case.run.rglob('*'))}")


@on_nodes(2)
def test_given_text_is_never_executed(case: JobCase) -> None:
    """Text that is special to a shell, sbatch or Hydra reaches the program unchanged."""
    text = """it's "$(touch ran)" `touch ran`; touch ran # %j %%A é ${HOME} *\n&& touch ran"""
    task = ("task=custom", "task._target_=tests.support.tasks.RecordsSamples", "batch.global_size=32", "lr.peak=0.05")
    elements = [case.element(f"run {text}"), case.element(f"\\ {text}")]  # backslashes are special in output paths
    jobs, folders = [], []
    for element in elements:
        folders.append(case.folder / f"samples {element.run.name}")
        folders[-1].mkdir()
        texts = {"task.args.folder": str(folders[-1]), "cluster.comment": text, "cluster.environment.NOTE": text}
        words = [override(key, value) for key, value in texts.items()]
        jobs.append(element.submit(override("run.dir", str(element.run)), *words, "duration=4st", base=task))
    for element, job, folder in zip(elements, jobs, folders, strict=True):
        element.expect_finish(job)
        rows = [row for file in folder.iterdir() for row in file.read_text().split()]
        check(len(rows) >= 4 * 32, f"{len(rows)} rows were recorded")
        check(field(job, "Comment").startswith(text.splitlines()[0]), field(job, "Comment"))
    ran = [path for root in (ROOT, case.folder) for path in root.rglob("ran")]
    check(not ran, f"the text was executed: {ran}")


@on_nodes(1)
def test_a_job_can_import_a_task_beside_the_config_dir(case: JobCase) -> None:
    project = case.folder / "project"
    (project / "configs/task").mkdir(parents=True)
    (project / "beside.py").write_text("from tests.faults.task import Faulty\n\n\nclass Beside(Faulty):\n    pass\n")
    given = "defaults: [custom, _self_]\nname: beside\n_target_: beside.Beside\n"
    (project / "configs/task/beside.yaml").write_text(given)
    base = (f"--config-dir={project}/configs", "task=beside", "batch.global_size=32", "lr.peak=0.05", "duration=1ep")
    case.expect_finish(case.submit(base=base))


@on_nodes(2)
def test_train_sbatch_resumes(case: JobCase) -> None:
    by_hand(case, "train.sbatch")


@on_nodes(2)
def test_torchrun_sbatch_resumes(case: JobCase) -> None:
    by_hand(case, "torchrun.sbatch")


def by_hand(case: JobCase, script: str) -> None:
    """Submit the unchanged script, signal its job, and check that the run resumes."""
    job = case.sbatch(script, **SLOWLY)
    case.await_step(12)
    run("scancel", "--signal=USR2", job)
    case.expect_finish(job)
    case.expect_same("4 ranks")
    stop = case.event("stopped", cause="SIGUSR2")
    case.event(
        "requeue", job=job, kind="stop", cause="^SIGUSR2, for example from `scancel --signal`$", step=stop["step"]
    )
    case.event("going_on", step=stop["step"])


@on_nodes(2)
def test_job_steps_run_at_the_same_time(case: JobCase) -> None:
    """Each step has its own port and outcome. Of two steps in one directory, one is rejected."""
    elements = [case.element("a"), case.element("b")]
    usual = ("cluster=slurm", "cluster.gpus_per_node=1", "device=cpu", ONE_THREAD, *BASE)
    lines = ["#!/bin/bash"]
    for number, element in enumerate([*elements, elements[0]]):
        (case.folder / f"fetched-{number}").mkdir()
        words = [sys.executable, "launch.py", *usual, f"run.dir={element.run}"]
        srun = ["srun", "--overlap", f"--nodes={len(case.nodes)}", "--ntasks-per-node=1", *words]
        env = {"FAULTS": "[]", "FETCHED": str(case.folder / f"fetched-{number}"), **SLOWLY}
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
        done = case.folder / f"step-{number}"
        lines.append(f"({given} {shlex.join(srun)} > {done}.out 2>&1; echo $? > {done}.code) &")
    script = case.folder / "steps.sh"
    script.write_text("\n".join([*lines, "wait", ""]))
    options = (
        f"--nodes={len(case.nodes)}",
        f"--nodelist={','.join(case.nodes)}",
        f"--output={case.folder}/slurm-%j.out",
    )
    job = run("sbatch", "--parsable", *options, str(script), cwd=ROOT).strip()
    check(case.await_end(job) == "COMPLETED", f"{field(job, 'JobState')}")
    outputs = [(case.folder / f"step-{number}.out").read_text() for number in range(3)]
    codes = [int((case.folder / f"step-{number}.code").read_text()) for number in range(3)]
    check(codes[1] == 0 and sorted(codes) == [0, 0, 2], f"exit codes {codes}: {outputs}")
    check("another launch works in" in outputs[codes.index(2)], f"{outputs}")
    for element in elements:
        check(element.outcome["state"] == "finished", f"{element.outcome}")
        element.event("start", job=f"^{job}$", world_size=2)
        check(element.distance(case.references("2 ranks")) == 0, "the runs differ")
