"""Test Slurm scripts by full equality, the parsing of real answers of Slurm, and decisions about ended jobs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isobatch.conf.compose import compose
from isobatch.conf.groups import Slurm
from isobatch.conf.identity import identity
from isobatch.conf.overrides import override
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.saved import frozen
from isobatch.scaling.errors import UserError
from isobatch.slurm.allocation import Allocation, as_local
from isobatch.slurm.end import End, parse_due, parse_unreached
from isobatch.slurm.render import directive, render
from isobatch.slurm.requeue import decide_requeue, requeued_by_slurm
from isobatch.slurm.state import Job, JobStart, address, down_nodes, parse_job, parse_queue, restarted_nodes
from isobatch.slurm.submit import common_cluster, prepare, refuse_unless_submittable
from tests.support.examples import examples
from tests.support.golden import golden

ON_SLURM = ("cluster=slurm", "cluster.gpus_per_node=2")
ALL = (
    "cluster.nodes=4", "cluster.partition=gpu", "cluster.account=lab-7", "cluster.qos=high", "cluster.time_min=90",
    "cluster.signal_s=300", "cluster.mem_gb=64.5", "cluster.cpus_per_gpu=8", "cluster.gres=gres",
    "cluster.constraint='a100&nvlink'", "cluster.exclude='n[1-3],n7'", "cluster.nodelist=n9", "cluster.reservation=e",
    "cluster.dependency=afterok:12", r"""cluster.comment='say "hi"; $(touch x) \\ #1'""", "cluster.mail=me@example.org",
    "cluster.setup=['module load cuda','source \"my env/bin/activate\"']",
    "cluster.extra=['--exclusive','--gres-flags=enforce-binding']", "cluster.max_parallel=2",
)  # fmt: skip


def cluster(*overrides: str) -> Slurm:
    found = compose([*ON_SLURM, *overrides]).cluster
    assert isinstance(found, Slurm)
    return found


def script(found: Slurm, runs: int = 1, output: str = "/scratch/runs/a b/logs/slurm-%j.out") -> str:
    words = [[f"run.dir=/scratch/{number}", f"run.config='/scratch/it\\'s {number}.yaml'"] for number in range(runs)]
    text, options = render(
        found, words, name="digits-1", output=output, python="/opt/my python", launcher="/opt/isobatch/launch.py"
    )
    assert [directive(option) for option in options] == [
        line for line in text.splitlines() if line.startswith("#SBATCH")
    ]
    return text


# ---- scripts


@pytest.mark.parametrize(
    ("name", "overrides", "runs"),
    [
        ("plain", (), 1),
        ("all", ALL, 1),
        ("array", ("cluster.max_parallel=2", "cluster.gres=none", "cluster.signal_s=0"), 3),
    ],
)
def test_script_equals_its_golden_file(name: str, overrides: tuple[str, ...], runs: int) -> None:
    made = script(cluster(*overrides), runs)
    golden(f"slurm-{name}", made)
    subprocess.run(["bash", "-n"], input=made, text=True, check=True)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(texts)
@examples(40)
def test_arguments_reach_the_run_unchanged(text: str) -> None:
    """Arguments survive Hydra's grammar and the script's shell, which executes none of them."""
    words = [override("run.dir", f"/{text}")]
    assert shlex.split(shlex.join(words)) == words
    assert compose([*words, "action=plan"]).run.dir == f"/{text}"


@given(texts)
@example("${HOME}")
@examples(20)
def test_a_frozen_config_is_found_at_any_path(text: str) -> None:
    """Paths are quoted as Hydra and OmegaConf read them."""
    with pytest.raises(UserError, match="can't be read") as error:
        compose([override("run.config", f"/absent/{text}")])
    assert str(Path(f"/absent/{text}")) in str(error.value)


def test_the_shell_keeps_the_words_of_a_run_unchanged(tmp_path: Path) -> None:
    words = [f"run.dir={text}" for text in ("it's", "a  b", "two\nlines", "$(touch x);`touch y`", "\\", '"')]
    made = render(cluster(), [words], name="n", output="o", python="python", launcher="launch.py")[0]
    array = next(line for line in made.split("\n\n") if line.startswith("run=("))
    done = subprocess.run(["bash", "-c", array + '\nprintf "%s\\0" "${run[@]}"'], capture_output=True, cwd=tmp_path)
    assert done.stdout.decode().split("\0")[:-1] == words
    assert list(tmp_path.iterdir()) == []


def test_options_that_no_directive_can_hold_are_arguments_of_sbatch() -> None:
    text, options = render(
        cluster("cluster.comment='two\nlines'"), [["x"]], name="n", output="o", python="python", launcher="launch.py"
    )
    assert options[-1] == "--comment=two\nlines"
    assert "lines" not in text


def test_directives_are_quoted_where_necessary() -> None:
    assert directive("--nodes=2") == "#SBATCH --nodes=2"
    assert directive("--exclusive") == "#SBATCH --exclusive"
    assert directive('--comment=a "b" \\ #c') == '#SBATCH --comment="a \\"b\\" \\\\ #c"'


# ---- frozen files and their folders


def test_a_frozen_config_holds_the_whole_run(tmp_path: Path) -> None:
    asked = [*ON_SLURM, "cluster.nodes=3", "batch.global_size=96", "lr.peak=0.3", "run.new=true", "device=cpu"]
    config = compose([*asked, "cluster.environment.A=1"])
    file = tmp_path / "it's a file.yaml"
    file.write_text(frozen(config, tmp_path / "run"))
    again = compose([override("run.dir", str(tmp_path / "run")), override("run.config", str(file))])
    assert again.run.dir == str(tmp_path / "run")
    assert not again.run.new
    assert again.model_copy(update={"run": config.run}) == config
    assert identity(again) == identity(config)
    assert (
        compose([f"run.config='{str(file).replace(chr(39), chr(92) + chr(39))}'", "action=requeue"]).action == "requeue"
    )
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        compose([override("run.config", str(file)), "lr.peak=1"])
    assert error.value.key == "lr.peak"


def test_a_submission_names_its_files(tmp_path: Path) -> None:
    one = prepare(cluster(), {tmp_path / "r": "config"}, tmp_path / "r", "stamp", Path("launch.py"))
    assert one.script == tmp_path / "r/submissions/stamp.sh"
    assert one.configs == {tmp_path / "r/submissions/stamp.yaml": "config"}
    assert one.output_of("7") == tmp_path / "r/logs/slurm-7.out"
    assert one.job_of("7", 0) == "7"
    runs = {tmp_path / "sweep" / name: name for name in "ab"}
    several = prepare(cluster(), runs, tmp_path / "sweep", "stamp", Path("launch.py"))
    assert list(several.configs) == [tmp_path / f"sweep/{name}/submissions/stamp.yaml" for name in "ab"]
    assert several.output_of("7") == tmp_path / "sweep/logs/slurm-7_*.out"
    assert several.job_of("7", 1) == "7_1"


def test_percents_and_backslashes_in_paths_are_escaped() -> None:
    percent = prepare(cluster(), {Path("/a%j"): ""}, Path("/a%j"), "stamp", Path("launch.py"))
    assert "#SBATCH --output=/a%%j/logs/slurm-%j.out" in percent.text
    backslash = prepare(cluster(), {Path("/a\\b"): ""}, Path("/a\\b"), "stamp", Path("launch.py"))
    assert '#SBATCH --output="/a\\\\\\\\b/logs/slurm.out"' in backslash.text
    assert backslash.output_of("7") == Path("/a\\b/logs/slurm.out")


# ---- errors before anything is submitted


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster=slurm"], "cluster.gpus_per_node="),
        ([*ON_SLURM, "debug=true"], "debug=true"),
    ],
)
def test_commands_that_no_job_can_run_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        refuse_unless_submittable(compose(overrides))


def test_a_sweep_is_one_array() -> None:
    two = [compose([*ON_SLURM, f"cluster.nodes={nodes}"]) for nodes in (1, 2)]
    assert common_cluster([two[0], two[0]]) == two[0].cluster
    with pytest.raises(UserError, match="one job array"):
        common_cluster(two)


# ---- inside a job

STEP = {
    "SLURM_JOB_ID": "20042", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4", "SLURMD_NODENAME": "gpu-b22",
}  # fmt: skip


def test_a_process_outside_of_a_step_is_refused() -> None:
    assert Allocation.within({}) is None
    with pytest.raises(UserError, match=r"job 5\b.*srun --ntasks-per-node=1"):
        Allocation.within({"SLURM_JOB_ID": "5"})
    with pytest.raises(UserError, match=r"8 tasks.* 2 nodes"):
        Allocation.within(STEP | {"SLURM_NTASKS": "8"})


def test_the_job_follows_from_the_environment() -> None:
    assert JobStart.here({}) == JobStart("", 0)
    assert JobStart.here({"SLURM_JOB_ID": "7"}) == JobStart("7", 0)
    assert JobStart.here({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == JobStart("7", 2)
    element = {"SLURM_JOB_ID": "22", "SLURM_ARRAY_JOB_ID": "22", "SLURM_ARRAY_TASK_ID": "3"}
    assert JobStart.here(element).id == "22_3"  # 22 would be the whole array


def test_the_jobs_machines_replace_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isobatch.slurm.allocation.address", lambda node: f"{node}-ib0")
    here = Allocation("20042", ("gpu-b21", "gpu-b22"), "gpu-b22", gpus=4)
    local = as_local(compose(["cluster=slurm", "cluster.max_restarts=2"]), here).cluster
    assert (local.nodes, local.gpus_per_node, local.max_restarts) == (2, 4, 2)
    assert local.rendezvous == "gpu-b21-ib0:10042"  # type: ignore[union-attr]
    beside = [replace(here, job=job, step=step).rendezvous() for job in ("20042", "20043") for step in range(9)]
    assert len({here.rendezvous(), *beside}) == len(beside)  # steps of this job and the next
    assert as_local(compose([*ON_SLURM]), here).cluster.gpus_per_node == 2
    assert as_local(compose([*ON_SLURM]), replace(here, hosts=("gpu-b21",))).cluster.rendezvous is None  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"cluster\.nodes=3\b.* 20042\b.*\b2\b"):
        as_local(compose([*ON_SLURM, "cluster.nodes=3"]), here)
    with pytest.raises(UserError, match=r"run\.new=true"):
        as_local(compose([*ON_SLURM, "run.new=true"]), here)


# ---- answers of Slurm (22.05)

SHOWN = (
    "JobId=23 ArrayJobId=22 ArrayTaskId=0 ArrayTaskThrottle=1 JobName=wrap UserId=me(1000) GroupId=me(1000) "
    "MCS_label=N/A Priority=4294901750 Nice=0 Account=(null) QOS=(null) JobState={state} Reason=None Dependency=(null) "
    "Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:04 TimeLimit=1-01:00:00 TimeMin=N/A "
    "SubmitTime=2026-11-26T00:53:52 EligibleTime=2026-11-26T00:53:52 AccrueTime=Unknown StartTime=2026-11-26T00:53:52 "
    "EndTime={end} Deadline=N/A PreemptEligibleTime=2026-11-26T00:53:52 PreemptTime={preempt} SuspendTime=None "
    "NodeList=n1 BatchHost=n1 NumNodes=1 Command=(null) WorkDir=/tmp Comment=a  b=c JobState=X Restarts=9 Power="
)


def test_the_answer_of_scontrol_is_parsed() -> None:
    began = datetime(2026, 11, 26, 0, 53, 52)
    shown = SHOWN.format(state="RUNNING", restarts=2, end="2026-11-27T01:53:52", preempt="None")
    found = parse_job(shown)
    assert found == Job("RUNNING", 2, False, began, began + timedelta(hours=25), timedelta(hours=25))
    assert not found.at_its_limit
    assert found.left_s(began + timedelta(hours=24)) == 3600
    over = parse_job(SHOWN.format(state="COMPLETING", restarts=0, end="2026-11-27T01:53:52", preempt="None"))
    assert over.at_its_limit
    earlier = parse_job(SHOWN.format(state="RUNNING", restarts=1, end="Unknown", preempt="2026-11-26T00:36:37"))
    assert not earlier.preempted  # another start was preempted
    preempted = parse_job(SHOWN.format(state="COMPLETING", restarts=0, end="Unknown", preempt="2026-11-26T01:36:37"))
    assert (preempted.preempted, preempted.ended, preempted.at_its_limit) == (True, None, False)
    assert parse_job("JobState=RUNNING TimeLimit=UNLIMITED StartTime=Unknown").left_s(began) is None


def test_the_answer_of_squeue_is_parsed() -> None:
    found = parse_queue(
        "22_1|PENDING|JobArrayTaskLimit|2026-11-26T00:53:52|N/A||/scratch/a|b\n3|x/submissions/s.sh\n"
        "22_0|RUNNING|None|2026-11-26T00:53:52|2026-11-26T00:54:00|n[1-2]|(null)\n"
    )
    assert list(found) == ["22_1", "22_0"]
    assert str(found["22_1"]) == "PENDING, JobArrayTaskLimit, since 2026-11-26 00:53:52"
    assert found["22_1"].root == "/scratch/a|b\n3|x"
    assert str(found["22_0"]) == "RUNNING on n[1-2], since 2026-11-26 00:54:00"
    assert found["22_0"].root == ""
    assert parse_queue("") == {}


NODES = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=1 State=IDLE BootTime=2026-11-26T00:17:45 SlurmdStartTime=2026-11-26T01:18:41 \
LastBusyTime=2026-11-26T01:19:05
NodeName=n2 State=UNKNOWN BootTime=None SlurmdStartTime=None
"""
ONE = "NodeName=n2 Gres=gpu:2 NodeAddr=10.0.0.2 NodeHostName=n2.example.org Port=6818"
STATES = "n1 idle\nn2 down*\nn3 mixed\nn3 mixed\nn4 idle*\nn5 DOWN\nn6 drained\n"
BEGAN = datetime(2026, 11, 26, 1, 18, 41)


@pytest.mark.parametrize(
    ("answer", "asked", "found"),
    [
        (STATES, lambda: down_nodes("n[1-6]"), ["n2", "n4", "n5"]),
        ("", lambda: down_nodes("n1"), []),
        (ONE, lambda: address("n2"), "10.0.0.2"),
        ("", lambda: address("n2"), "n2"),
        (NODES, lambda: restarted_nodes("n[1-2]", BEGAN), ["n1"]),
        (NODES, lambda: restarted_nodes("n[1-2]", BEGAN + timedelta(seconds=1)), []),
    ],
)
def test_the_answers_about_nodes_are_parsed(
    answer: str, asked: Callable[[], Any], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobatch.slurm.state.ask", lambda *words: answer)
    assert asked() == found


OUTPUT = """\
slurmstepd-n4: error: *** JOB 4 ON n4 CANCELLED AT 2026-11-26T00:36:37 DUE TO PREEMPTION ***
slurmstepd-n4: error: *** STEP 4.0 ON n4 CANCELLED AT 2026-11-26T00:36:39{} ***
srun: forcing job termination
"""


@pytest.mark.parametrize(
    ("due", "found"),
    [
        (" DUE TO PREEMPTION", "PREEMPTION"),
        (" DUE TO JOB REQUEUE", "JOB REQUEUE"),
        (" DUE TO TIME LIMIT", "TIME LIMIT"),
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", "NODE FAILURE"),
        ("", None),
    ],
)
def test_slurms_reason_for_an_end_is_parsed(due: str, found: str | None) -> None:
    """The end of an earlier start doesn't count."""
    assert parse_due(OUTPUT.format(due), datetime(2026, 11, 26, 0, 36, 38)) == found
    assert parse_due(OUTPUT.format(due), datetime(2026, 11, 26, 0, 36, 40)) is None


# ---- decisions about an ended job

NOW = datetime(2026, 11, 26, 12)
HOUR = timedelta(hours=1)
RUNNING = Job("RUNNING", 0, False, NOW - HOUR, NOW + HOUR, 2 * HOUR)
ENDING = replace(RUNNING, state="COMPLETING", ended=NOW)


def end(state: str, cause: str = "", *, events: tuple[dict[str, Any], ...] = (), **more: Any) -> End:
    start = {"event": "start", "job": "7", "job_restart": 0}
    known = {"step": 50, "code": 75 if state == "stopped" else 1, "job": RUNNING, "due": None, "down": (), "now": NOW}
    return End(
        **{
            "identifier": "7",
            "restart": 0,
            "outcome": Outcome(state, cause, 50, 800, "a1"),  # type: ignore[arg-type]
            "events": (*events, start),
            **known,
            **more,
        }
    )


def crash(step: int, job: str = "7") -> dict[str, Any]:
    return {"event": "requeue", "kind": "crash", "job": job, "step": step}


LATE = NOW + HOUR - timedelta(seconds=150)
STOP = {"event": "requeue", "kind": "stop", "job": "7", "step": 50}


@pytest.mark.parametrize(
    ("ended", "event", "kind", "cause"),
    [
        (end("finished"), "finished", None, ""),
        (end("stopped", "SIGUSR2"), "requeue", "stop", "SIGUSR2, for example from `scancel --signal`"),
        (end("stopped", "SIGUSR2", now=NOW + HOUR - timedelta(seconds=150)), "requeue", "stop", "its time limit"),
        (end("stopped", "SIGTERM", job=replace(RUNNING, preempted=True)), "requeue", "stop", "preempted: a job with"),
        (end("stopped", "SIGTERM", job=replace(ENDING, preempted=True)), "requeue", "stop", "preempted: a job with"),
        (end("stopped", "SIGTERM", job=replace(ENDING, restarts=1), due="PREEMPTION"), "requeue", "stop", "preempted"),
        (
            end("stopped", "SIGTERM", job=replace(ENDING, restarts=1), due="JOB REQUEUE"),
            "requeue",
            "stop",
            "`scontrol req",
        ),
        (end("stopped", "SIGTERM", job=ENDING), "cancelled", "stop", "`scancel`"),
        (end("crashed", "boom", job=ENDING), "cancelled", "stop", "`scancel`"),
        (end("stopped", "SIGTERM", job=replace(ENDING, ended=NOW + HOUR)), "requeue", "stop", "its time limit"),
        (
            end("running", job=replace(ENDING, ended=NOW + HOUR)),
            "requeue",
            "stop",
            "its time limit; it ended before the run was saved",
        ),
        (
            end("stopped", "SIGUSR2", now=LATE, events=3 * (STOP,)),
            "not_requeued",
            "stop",
            "its time limit, 4 times at st",
        ),
        (
            end("stopped", "SIGUSR2", now=LATE, events=(STOP, STOP, crash(50), STOP)),
            "requeue",
            "stop",
            "its time limit",
        ),
        (end("stopped", "SIGUSR2", now=LATE, events=3 * (STOP,), step=51), "requeue", "stop", "its time limit"),
        (end("refused", "no such module"), "not_requeued", None, "no such module"),
        (end("crashed", "no word from rank 1", down=("n2",)), "requeue", "node", "node n2 is down"),
        (end("running", due="NODE FAILURE"), "requeue", "node", "a node failed"),
        (end("crashed", "rank 1: boom"), "requeue", "crash", "rank 1: boom"),
        (end("running"), "requeue", "crash", "it ended without recording a cause"),
        (end("crashed", "boom", step=0), "not_requeued", "crash", "boom; it got no further than step 0"),
        (
            end("crashed", "boom", events=(crash(50),)),
            "not_requeued",
            "crash",
            "boom; it got no further than step 50, as",
        ),
        (end("crashed", "boom", events=(crash(40),)), "requeue", "crash", "boom"),
        (end("crashed", "boom", events=(crash(9), crash(40))), "not_requeued", "crash", "cluster.max_requeues=2 times"),
        (end("crashed", "boom", events=(crash(9, "6"), crash(40))), "requeue", "crash", "boom"),
        (end("oom", "too small", step=1), "requeue", "crash", "too small"),
    ],
)
def test_an_ended_job_is_requeued_or_not(ended: End, event: str, kind: str | None, cause: str) -> None:
    verdict = decide_requeue(ended, max_requeues=2, signal_s=120)
    assert (verdict.event, verdict.kind) == (event, kind)
    assert cause in verdict.cause


def test_a_crash_that_would_repeat_is_not_requeued() -> None:
    ended = end("crashed", "loss nan")
    for again, event in ((True, "requeue"), (False, "not_requeued")):
        last = (*ended.events, {"event": "crashed", "again": again})
        assert decide_requeue(replace(ended, events=last), max_requeues=2, signal_s=120).event == event


STARTS = [
    (75, "requeue"),
    (140, "requeue"),
    (143, "requeue"),
    (2, "not_requeued"),
    (1, "not_requeued"),
    (0, "finished"),
]


@pytest.mark.parametrize(("code", "event"), STARTS)
def test_a_start_that_never_opened_its_run_is_judged_by_its_exit_code(code: int, event: str) -> None:
    """Another launch may own the run, so the outcome isn't this job's."""
    other = end("running", code=code, identifier="8")
    assert decide_requeue(other, max_requeues=2, signal_s=120).event == event
    again = end("stopped", code=code, restart=1)
    assert decide_requeue(again, max_requeues=2, signal_s=120).event == event


UNREACHED = {"event": "requeue", "kind": "node", "job": "8", "step": 0}


@pytest.mark.parametrize(
    ("events", "event"), [((), "requeue"), ((UNREACHED,), "requeue"), (2 * (UNREACHED,), "not_requeued")]
)
def test_an_unreachable_node_is_tried_a_few_times(events: Any, event: str) -> None:
    """The exit code of srun doesn't matter. Only events since the last start count."""
    ended = end("finished", identifier="8", code=140, unreached=("n2",), events=2 * (UNREACHED,))
    verdict = decide_requeue(replace(ended, events=(*ended.events, *events)), max_requeues=2, signal_s=120)
    assert (verdict.event, verdict.kind) == (event, "node")
    assert verdict.cause.startswith("node n2 can't be reached")


SRUN = "srun: error: Task launch for StepId=8.0 failed on node {}: Communication connection failure\n"


def test_nodes_that_srun_did_not_reach_are_parsed() -> None:
    """Only the output of the current start counts."""
    assert parse_unreached(SRUN.format("n2") + SRUN.format("n1")) == ["n1", "n2"]
    earlier = SRUN.format("n2") + OUTPUT.format(" DUE TO JOB REQUEUE")
    assert parse_unreached(earlier) == []
    assert parse_unreached(earlier + SRUN.format("n3")) == ["n3"]


# ---- jobs requeued by Slurm itself

AT = datetime(2026, 11, 26, 0, 36, 30).astimezone().strftime("%Y-%m-%dT%H:%M:%S%z")
EVENT = {"event": "start", "job": "7", "time": AT, "hosts": ["n1", "n2"]}
KILLED = "`scontrol requeue`; it was killed before"


@pytest.mark.parametrize(
    ("due", "state", "down", "began", "kind", "cause"),
    [
        (None, "running", ["n1"], "2026-11-26T00:00:00", "node", "node n1 is down"),
        (None, "running", [], "2026-11-26T00:37:00", "node", "node n2 went down and came back"),
        (" DUE TO NODE FAILURE", "running", [], "2026-11-26T00:00:00", "node", "a node failed"),
        (" DUE TO JOB REQUEUE", "running", [], "2026-11-26T00:37:00", "stop", KILLED),
        (" DUE TO JOB REQUEUE", "stopped", [], "2026-11-26T00:37:00", "stop", "`scontrol requeue`"),
        (None, "running", [], "2026-11-26T00:00:00", None, "Slurm requeued it for an unknown reason"),
    ],
)
def test_the_cause_of_a_requeue_by_slurm_is_found(
    due: str | None, state: str, down: list[str], began: str, kind: str | None, cause: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "an output"
    output.write_text("" if due is None else OUTPUT.format(due))
    answers = {
        "job": f"JobState=RUNNING\n   StdOut={output}\n",
        "--nodes": "".join(f"{node} down*\n" for node in down),
        "node": f"NodeName=n2 State=IDLE SlurmdStartTime={began}\n",
    }
    monkeypatch.setattr(
        "isobatch.slurm.state.ask", lambda *words: next(text for key, text in answers.items() if key in words)
    )
    outcome = Outcome(state, "", 5, 80, "a1")  # type: ignore[arg-type]
    (tmp_path / "outcome.json").write_text(json.dumps(asdict(outcome)))
    (tmp_path / "events.jsonl").write_text(json.dumps(EVENT) + "\n")
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    found = requeued_by_slurm(tmp_path, env)
    assert found is not None
    assert (found.event, found.kind) == ("requeue", kind)
    assert found.cause.startswith(cause)
    assert ("killed" in found.cause) == ("killed" in cause)
    assert requeued_by_slurm(tmp_path, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}) is None
    assert requeued_by_slurm(tmp_path, {"SLURM_JOB_ID": "7"}) is None
    (tmp_path / "events.jsonl").write_text(json.dumps(EVENT) + "\n" + json.dumps(crash(5)) + "\n")
    assert requeued_by_slurm(tmp_path, env) is None
