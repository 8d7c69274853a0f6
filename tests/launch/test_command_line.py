"""Test ``python launch.py`` end to end: its output, its exit code, and the files it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from isobatch.conf.compose import compose
from isobatch.conf.help import EXAMPLES
from isobatch.conf.identity import identity
from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.saved import dump
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.report.plan_json import to_json
from isobatch.trainers.checkpoints.commit import compose as manifest_of
from isobatch.trainers.tensors.manifest import NAME, Header
from isobatch.trainers.tensors.names import file_of, folder_of
from tests.support.warm import Warm

ROOT = Path(__file__).parents[2]
OWN_TASK = """
from isobatch.trainers.tasks.digits import Digits

class Task(Digits):
    def __init__(self, broken=False, width=8, depth=1, dropout=0.0):
        super().__init__(width, depth, dropout)
        assert not broken, "meant to"

    def train_data(self):
        return range(123)
"""
QUICK = ("task=digits", "duration=2st", "task.args.width=8", "evaluate.every=null", "device=cpu")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command in its own folder, which isn't the checkout."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def launch(*arguments: str, code: int = 0, cold: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. ``cold`` runs it in a new process, which imports everything itself."""
    env = {**os.environ, **env}
    if cold:
        done = subprocess.run(command(*arguments), env=env, capture_output=True, text=True, timeout=120)
    else:
        process = Warm(list(arguments), Path.cwd(), env)
        out, err = process.communicate(timeout=120)
        done = subprocess.CompletedProcess(arguments, process.wait(), out, err)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(*arguments: str, **env: Any) -> str:
    """Return the message of a refusal. Check that it is the only output, and that no file is written."""
    done = launch(*arguments, code=2, **env)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("isobatch: ")
    assert list(Path().iterdir()) == []
    return done.stderr


# ---- plans


def test_plan_prints_only_a_table_or_json() -> None:
    assert "global batch" in launch("action=plan", cold=True).stdout
    plan = json.loads(launch("action=plan", "output=json", "cluster.nodes=16", "cluster.gpus_per_node=8").stdout)
    assert plan["world_size"] == 128
    assert sum(size * count for size, count in plan["micro_batches"]) == plan["global_size"]
    assert list(Path().iterdir()) == []


def test_plan_for_other_hardware_needs_none_of_it() -> None:
    launch("action=plan", "device=cuda", "cluster.nodes=100", "cluster.gpus_per_node=1000")


def test_plan_imports_no_torch_and_starts_no_git() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "launch.py"), "action=plan"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": ""},
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy", "rich", "sklearn")}


def test_plan_can_open_the_data() -> None:
    Path("mine.py").write_text(OWN_TASK)
    own = ("action=plan", "task=custom", "task._target_=mine.Task", "lr.peak=0.1")
    assert "unknown until the data is opened" in launch(*own).stdout
    assert json.loads(launch(*own, "plan.open_data=true", "output=json").stdout)["train_samples"] == 123


def test_full_batch_opens_the_data_of_a_custom_task() -> None:
    """The plan needs the data's size. A task that can't be imported is refused as in any other run."""
    own = ("task=custom", "task._target_=tests.support.tasks.Counted", "lr.peak=0.1", "batch.global_size=all")
    assert "has no Cuonted; did you mean tests.support.tasks.Counted?" in refused(
        *own, "task._target_=tests.support.tasks.Cuonted"
    )
    done = launch(*own, "duration=2st", "cluster.gpus_per_node=2", "device=cpu")
    assert "global batch   500 samples" in done.stdout
    assert "finished after 2 steps, 1,000 samples" in done.stdout


def test_a_task_that_exits_with_a_text_fails() -> None:
    Path("mine.py").write_text("import sys\nsys.exit('give a folder')\n")
    own = ("task=custom", "task._target_=mine.Task", "lr.peak=0.1")
    assert launch("action=plan", "plan.open_data=true", *own, code=1).stderr == "give a folder\n"


def test_plan_under_torchrun_is_printed_once() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    printed = [launch("action=plan", **torchrun, RANK=rank, LOCAL_RANK=rank).stdout for rank in "012"]
    assert "3 ranks" in printed[0]
    assert printed[1:] == ["", ""]
    errors = [launch("foo=1", code=2, **torchrun, RANK=rank, LOCAL_RANK=rank).stderr for rank in "012"]
    assert errors[0].startswith("isobatch: unknown key foo")
    assert errors[1:] == ["", ""]


def test_plan_ignores_ranks_that_a_cluster_left_in_the_environment() -> None:
    assert "1 rank" in launch("action=plan", RANK="3", LOCAL_RANK="1").stdout
    assert launch("foo=1", code=2, LOCAL_RANK="1").stderr.startswith("isobatch: unknown key foo")
    launch(*QUICK, "debug=true", RANK="3", LOCAL_RANK="1")


def checkpoint(run: Path, step: int, world: int, *overrides: str) -> None:
    """Write a run directory with a checkpoint without tensors, as ``world`` ranks would."""
    config = compose(overrides)
    plan, folder = resolve(config, world), folder_of(RunDir(run), step)
    header = Header(
        identity=plan.identity,
        duration=str(config.duration),
        world_size=world,
        step=step,
        samples=step * plan.cut.global_size,
        skipped=0,
        evaluation_owed=False,
        fingerprint=None,
        evaluation=None,
        plan=plan,
    )
    folder.mkdir(parents=True)
    empty = (2).to_bytes(8, "little") + b"{}"
    for rank in range(world):
        (folder / file_of(rank)).write_bytes(empty)
    part = {"bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest(), "slices": {}}
    (folder / NAME).write_bytes(manifest_of(header, [part] * world, {}))
    (run / "config.yaml").write_text(dump(config))
    (run / "plan.json").write_text(to_json(plan))
    RunDir(run).write_outcome(Outcome("stopped", "SIGTERM", step, header.samples, "x"))


def planned(*arguments: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(launch("action=plan", "output=json", *arguments).stdout)
    return plan


def test_plan_of_a_resumed_run_keeps_its_global_batch() -> None:
    """The global batch was the product of per-GPU batch, accumulation and ranks, and the ranks have changed."""
    product = ("batch.per_gpu=16", "batch.accumulation=2", "seed=3")
    run = Path("runs") / f"digits-{identity(compose(product))}"
    checkpoint(run, 10, 2, *product)
    for command in ([f"run.dir={run}"], product):
        plan = planned(*command, "cluster.gpus_per_node=3")
        assert (plan["global_size"], plan["per_gpu"], plan["accumulation"], plan["world_size"]) == (64, 16, 2, 3)
    assert planned(*product, "task=digits", "run.dir=other", "cluster.gpus_per_node=3")["global_size"] == 96
    checkpoint(run, 20, 3, *product)  # damaged below, so the previous one counts
    (folder_of(RunDir(run), 20) / NAME).write_text("{")
    assert planned(*product)["global_size"] == 64


def test_plan_of_an_extended_run_covers_the_whole_run() -> None:
    short, long = ("duration=2ep", "lr.warmup=10%"), ("duration=4ep", "lr.warmup=10%")
    checkpoint(Path("run"), 10, 2, *short)
    fresh = planned(*short)
    assert planned("run.dir=run") == fresh
    assert planned("run.dir=run", "duration=4ep") == planned(*long)
    assert "run.dir=run has duration=2ep" in launch("action=plan", "run.dir=run", "duration=1ep", code=2).stderr
    extended = Path("runs") / f"digits-{fresh['identity']}"
    checkpoint(extended, 30, 1, *long)
    assert planned(*short) == fresh


def test_plan_is_printed_on_a_terminal_without_unicode() -> None:
    assert (
        "global batch   64 samples = 64 per GPU ? 1 rank"
        in launch("action=plan", cold=True, PYTHONIOENCODING="ascii").stdout
    )


# ---- refusals before anything starts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["batch.globl_size=3"], "did you mean batch.global_size?"),
        (["duration=0ep"], "duration"),
        (["duration=5%"], "duration=5%"),
        (["batch.global_size=2", "batch.even=true", "cluster.gpus_per_node=3"], "batch.even"),
        (["batch.global_size=100", "batch.per_gpu=10", "batch.accumulation=3"], "accumulation"),
        (["lr.warmup=3000ep"], "lr.warmup"),
        (["optimizer=custom", "optimizer._target_=torch.optim.RMSprop"], "lr.base"),
        (["-m", "seed=1,x"], "seed=x: seed=x "),
        (["-m", "--cfg", "job"], "-m"),
        (["action=evaluate", "run.dir=runs/x"], "write init_from=runs/x"),
        (["-m", "action=evaluate", "init_from=/tmp,/"], "-m is a sweep of runs"),
        (["debug=true", "cluster.gpus_per_node=2"], "debug=true"),
        (["device=cuda", "cluster.environment.CUDA_VISIBLE_DEVICES=''"], "no GPU is visible"),
        (["run.dir=typo", "seed=3"], "run.dir=typo holds no run to resume; a new run there needs its task"),
        (["run.dir=typo", "action=plan"], "run.dir=typo holds no run"),
        (["task=digits", "run.dir=/proc/version"], "/proc/version isn't a folder"),
        (["task=digits", "run.dir=/proc/version/below"], "/proc/version isn't a folder"),
        (["task.name=caf\udce9"], "task.name"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_mistakes_are_refused_with_one_message(arguments: list[str], expected: str) -> None:
    """These are some messages of tests/golden/messages.txt, and some of later checks."""
    message = refused(*arguments)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_sweep_under_torchrun_is_refused() -> None:
    assert "torchrun" in refused("-m", "seed=1,2", cold=True, TORCHELASTIC_RUN_ID="x", RANK="0", WORLD_SIZE="1")


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root can write anywhere except on a read-only disk, such as /proc/sys in containers
        folder = next(path for path in ("/sys/kernel", "/proc/sys") if not os.access(path, os.W_OK))
    else:
        folder = str(tmp_path / "closed")
        Path(folder).mkdir(mode=0o555)
    assert f"{folder} isn't a folder that can be written to" in refused("task=digits", f"run.dir={folder}/run")


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=custom", "task._target_=mine.Tsk", "lr.peak=0.1", "cluster.gpus_per_node=2"],
        ["task=digits", "task.args.widht=3", "run.dir=some/where"],
        ["task=digits", "task.train_samples=5"],
        ["task=digits", "recompute=[nothing]", "debug=true"],
    ],
)
def test_a_rejected_start_leaves_nothing(arguments: list[str]) -> None:
    """The workers reject it, in a run directory."""
    done = launch(*arguments, "device=cpu", code=2)
    assert len(done.stderr.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_a_rejected_start_leaves_what_was_there() -> None:
    wrong = [*QUICK, "recompute=[nothing]", "run.dir=runs/mine"]
    Path("runs/mine").mkdir(parents=True)
    launch(*wrong, code=2)
    assert json.loads(Path("runs/mine/outcome.json").read_text())["state"] == "refused"
    launch(*wrong, code=2)
    assert Path("runs/mine/outcome.json").exists()


# ---- help and config


def test_help_lists_keys_and_exit_codes() -> None:
    text = launch("--help").stdout
    assert "batch.global_size=" in text
    assert "exit codes: 0 finished" in text
    assert "show its result if it is finished" in text
    assert "begins with 'defaults: [custom, _self_]'" in " ".join(text.split())
    keys = launch("--help", COLUMNS="80").stdout.partition("keys, with their defaults:")[2]
    assert max(map(len, keys.partition("options:")[0].splitlines())) <= 92  # the durations take one line


def test_help_may_be_cut_short() -> None:
    cut = f"{' '.join(command('--help'))} | head -1"
    done = subprocess.run(["bash", "-c", cut], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


def test_config_is_printed_with_comments_and_works_as_an_experiment(tmp_path: Path) -> None:
    arguments = ("optimizer=adamw", "batch.global_size=32", "lr.warmup=7%")
    text = launch("--cfg", "job", *arguments).stdout
    assert yaml.safe_load(text)["optimizer"]["name"] == "adamw"
    assert "global_size: 32  # samples" in text
    folder = tmp_path / "my conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment/again.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /optimizer: adamw\n{text}"
    )
    again = launch("--cfg", "job", "--config-dir", str(folder), "experiment=again").stdout
    assert again == text


# ---- runs


def state(folder: Path) -> dict[Path, int]:
    """Return all files below a folder, with the time at which each was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def only_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def test_the_same_command_finds_its_run() -> None:
    first = launch(*QUICK).stdout
    run = only_run()
    assert first.splitlines()[-1].startswith("finished after 2 steps")
    assert first.splitlines()[-1].endswith(str(run))
    event = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    assert event["command"].startswith(f"python {ROOT / 'launch.py'} task=digits")
    assert re.fullmatch(r"[0-9a-f]{40}|", event["commit"])
    before = state(run)

    again = launch(*QUICK, "evaluate.every=null").stdout
    assert again.startswith("finished after 2 steps")
    by_name = launch(f"run.dir={run}").stdout
    assert by_name.startswith("finished after 2 steps")
    assert state(run) == before

    error = launch(f"run.dir={run}", "seed=3", "batch.global_size=8", code=2).stderr
    assert "seed=3 (the run has 0)" in error
    assert "batch.global_size=8 (the run has " in error

    error = launch(f"run.dir=runs/{run.name[:-1]}", code=2).stderr
    assert f"holds no run to resume; did you mean {run}?" in error

    launch(*QUICK, "run.new=true")
    assert {path.name for path in Path("runs").iterdir()} == {run.name, f"{run.name}-2"}


def test_a_finished_run_reports_changes_that_it_does_not_have() -> None:
    """They are keys that aren't applied, the task's source, and the repository. Extending the run records them."""
    who = "git -c user.name=A -c user.email=a@example.org"
    subprocess.run(f"git init -q && touch a && git add a && {who} commit -qm 1", shell=True, check=True)
    Path("mine.py").write_text("from helper import Task\n")
    Path("helper.py").write_text(OWN_TASK.partition("    def train_data")[0])
    launch(*QUICK, "task._target_=mine.Task", "run.dir=run")

    Path("helper.py").write_text(Path("helper.py").read_text() + "# edited\n")
    Path("a").write_text("edited")
    keys = ("compile=true", "checkpoint.best=val/loss:min", "batch.per_gpu=16", "device=auto", "evaluate.every=null")
    for _ in range(2):
        result, *notes = launch("run.dir=run", *keys).stdout.splitlines()
        assert result.startswith("finished after 2 steps")
        assert len(notes) == 2
        assert notes[0].endswith(": batch.per_gpu=16, checkpoint.best=val/loss:min, compile=true")
        assert re.search(r": helper.py, the repository \((\w{7}), now \1 with uncommitted changes\)$", notes[1])

    longer = launch("run.dir=run", "duration=3st").stdout
    assert "changed since the run was last trained: helper.py, the repository" in longer
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("not_applied", "changed")] == [
        "not_applied", "changed", "changed"
    ]  # fmt: skip
    assert {event["new"] for event in events[:1]} == {True}
    assert len(launch("run.dir=run").stdout.splitlines()) == 1


def test_a_new_run_from_a_run_directory_has_its_config() -> None:
    launch(*QUICK, "run.dir=a", "optimizer=adamw", "batch.global_size=32")
    launch("run.dir=a", "run.new=true", "seed=3", "device=cpu")
    plans = [json.loads((Path(name) / "plan.json").read_text()) for name in ("a", "a-2")]
    assert [plan["optimizer"]["name"] for plan in plans] == ["adamw", "adamw"]
    assert [(plan["global_size"], plan["steps"], plan["seed"]) for plan in plans] == [(32, 2, 0), (32, 2, 3)]


def test_a_directory_of_another_run_is_refused() -> None:
    launch(*QUICK)
    run = only_run()
    (run / "config.yaml").unlink()
    assert "holds another run" in launch(*QUICK, "seed=1", f"run.dir={run}", code=2).stderr


def test_a_damaged_config_is_refused() -> None:
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("format: 1\ngiven: [")
    error = launch("run.dir=broken", code=2).stderr
    assert error.startswith("isobatch: broken/config.yaml can't be read")
    assert len(error.splitlines()) == 1


def test_a_directory_may_have_an_odd_name() -> None:
    name = 'it\'s a "run" with $HOME; `x` [1]'
    quoted = name.replace("'", "\\'")
    launch(*QUICK, f"run.dir='{quoted}'")
    assert json.loads((Path(name) / "outcome.json").read_text())["state"] == "finished"


# ---- resumed and extended runs


def test_a_finished_run_is_extended_by_its_directory() -> None:
    launch(*QUICK)
    run = only_run()
    done = launch(f"run.dir={run}", "duration=5st", "device=cpu").stdout
    assert "duration       5 steps = 320 samples" in done
    assert "resuming from step 2 of 5" in done
    assert done.splitlines()[-1].startswith("finished after 5 steps, 320 samples")
    assert yaml.safe_load((run / "config.yaml").read_text())["duration"] == "5st"
    assert json.loads((run / "plan.json").read_text())["steps"] == 5
    losses = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 5]
    before = state(run)
    for command in ([f"run.dir={run}"], [f"run.dir={run}", "duration=5st"]):
        assert launch(*command).stdout.startswith("finished after 5 steps")
    error = launch(*QUICK, code=2).stderr
    assert f"holds this run with duration=5st, not 2st; run.dir={run} resumes that" in error
    assert state(run) == before


def test_help_examples_that_need_a_run_work(tmp_path: Path) -> None:
    """Only the run's name is replaced."""
    launch("duration=1ep", "task.args.width=8", "device=cpu")
    run = only_run()
    examples = [line.split()[2:] for line in EXAMPLES.splitlines() if "runs/digits-0123456789ab" in line]
    assert len(examples) == 4
    for example in examples:
        arguments = [argument.replace("runs/digits-0123456789ab", str(run)) for argument in example if "=" in argument]
        width = ["task.args.width=8", "duration=1ep"] if arguments[0].startswith("init_from") else []
        launch(*arguments, *width)
    assert json.loads((run / "plan.json").read_text())["epochs"] == 40


# ---- evaluation


def test_weights_are_evaluated_and_nothing_is_written() -> None:
    """JSON is the only text on stdout, even if the task prints on every rank."""
    talking = OWN_TASK.partition("    def train_data")[0] + "        print('task')\n"
    talking += "    def evaluate(self, model, batch):\n        print('evaluate')\n"
    talking += "        losses, measures = self.loss(model, batch)\n"
    talking += "        return {'loss': (losses.sum(), len(losses)), **measures}\n"
    Path("mine.py").write_text(talking)
    launch(*QUICK, "task._target_=mine.Task", "run.dir=run", "ema=1ep")
    before = state(Path())
    trained = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])

    arguments = ("action=evaluate", "init_from=run/checkpoints/step-00000002", "output=json", "device=cpu")
    done = launch(*arguments, "cluster.gpus_per_node=2")
    evaluated = json.loads(done.stdout)
    assert set(evaluated) == {"source", "val/loss", "val/accuracy", "ema/loss", "ema/accuracy"}
    assert {name: trained[name] for name in evaluated if name != "source"} == pytest.approx(
        {name: value for name, value in evaluated.items() if name != "source"}, rel=1e-5
    )
    assert "evaluate" in done.stderr

    line = launch("action=evaluate", "init_from=run", "debug=true", "device=cpu").stdout.splitlines()[-1]
    assert line.startswith(f"val/loss {trained['val/loss']:.4f} · val/accuracy ")
    assert line.endswith("run/final/model.safetensors")

    done = launch("action=evaluate", "init_from=run", "task.args.width=9", "output=json", "device=cpu", code=2)
    assert "doesn't fit the model" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert state(Path()) == before


# ---- sweeps


def test_a_sweep_runs_its_elements_and_ends_with_a_table() -> None:
    done = launch("-m", *QUICK, "batch.global_size=8,16", "optimizer=sgd,adamw")
    table = done.stdout.splitlines()[-6:]
    assert table[0].split()[:3] == ["batch.global_size", "optimizer", "state"]
    assert {"steps", "samples", "peak", "loss", "val/loss", "val/accuracy", "time", "samples/s"} <= set(
        table[0].split()
    )
    assert [line.split()[:5] for line in table[1:5]] == [
        [size, optimizer, "finished", "2", str(2 * int(size))] for size in ("8", "16") for optimizer in ("sgd", "adamw")
    ]
    assert table[5] == str(only_run())
    assert {path.name for path in only_run().iterdir()} == {
        f"batch.global_size={size},optimizer={optimizer}" for size in (8, 16) for optimizer in ("sgd", "adamw")
    }
    more = launch("-m", *QUICK, "batch.global_size=8,4", "optimizer=sgd,adamw").stdout
    assert more.count("(run.new=true trains again") == 2
    assert len(list(only_run().iterdir())) == 6


def test_a_sweep_trains_several_runs_at_a_time() -> None:
    """Each waits in its first evaluation for the other. Their lines carry their numbers, and the table is as ever."""
    Path("mine.py").write_text(
        OWN_TASK.partition("    def train_data")[0]
        + "    def summarise(self, totals):\n"
        + "        import os, pathlib, time\n"
        + "        pathlib.Path(str(os.getpid())).mkdir(exist_ok=True)\n"
        + "        while sum(path.name.isdecimal() for path in pathlib.Path().iterdir()) < 2:\n"
        + "            time.sleep(0.01)\n"
        + "        return {}\n"
    )
    sweep = ("-m", *QUICK, "task._target_=mine.Task", "seed=1,2,3", "search.parallel=2")
    done = launch(*sweep, "check.contract=false", "cluster.timeout_s=60")
    table = done.stdout.splitlines()[-5:]
    assert [line.split()[:2] for line in table[1:4]] == [[seed, "finished"] for seed in "123"]
    for number in (1, 2, 3):
        assert f"[{number} of 3] seed={number}" in done.stdout
        assert [line for line in done.stdout.splitlines() if line.startswith(f"[{number} of 3] step 2/2")]


def test_a_sweep_of_plans_prints_a_table_or_json() -> None:
    table = launch("-m", "action=plan", "batch.global_size=64,256").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["batch.global_size", "64", "256"]
    plans = json.loads(launch("-m", "action=plan", "output=json", "batch.global_size=64,256").stdout)
    assert [plan["global_size"] for plan in plans] == [64, 256]
    said = launch("-m", "action=plan", "lr.decay=cosine,constant", "seed=1,2", "lr.final=0.1").stderr
    assert [line.split()[:2] for line in said.splitlines()] == [["warning:", "lr.final"]]  # of two runs, once
    assert list(Path().iterdir()) == []


def test_a_sweep_continues_after_a_crash() -> None:
    Path("mine.py").write_text(OWN_TASK.partition("    def train_data")[0])
    arguments = ("task._target_=mine.Task", "task.args.broken=true,false")
    done = launch("-m", *QUICK, *arguments, code=1)
    rows = done.stdout.splitlines()[-3:-1]
    assert [row.split()[1] for row in rows] == ["crashed", "finished"]
    assert "meant to" in rows[0]  # the cause, in its row
    assert "meant to" in done.stderr


def test_a_sweep_into_a_folder_of_other_runs_starts_nothing() -> None:
    launch("-m", *QUICK, "run.dir=here", "seed=2,3")
    before = state(Path())
    done = launch("-m", *QUICK, "run.dir=here", "seed=1,2", "lr.base=0.3", code=2)
    assert done.stdout == ""
    assert "here/seed=2 holds another run" in done.stderr
    Path("theirs/seed=2").mkdir(parents=True)
    Path("theirs/seed=2/thesis.tex").touch()
    done = launch("-m", *QUICK, "run.dir=theirs", "seed=1,2", code=2)
    assert (done.stdout, "thesis.tex" in done.stderr) == ("", True)
    assert not Path("theirs/seed=1").exists()
    assert before.items() <= state(Path()).items()


def test_a_sweep_whose_runs_are_all_refused_is_refused() -> None:
    sweep = ("-m", *QUICK, "task.args.foo=1,2")
    done = launch(*sweep, code=2)
    assert [line.split()[1] for line in done.stdout.splitlines()[-3:-1]] == ["refused", "refused"]


@pytest.mark.parametrize(
    ("ctrl_c", "at_a_time"), [(False, 1), (True, 1), (True, 2)], ids=["TERM", "Ctrl-C", "two runs"]
)
def test_a_stopped_sweep_starts_no_further_run(ctrl_c: bool, at_a_time: int) -> None:
    arguments = ["-m", "duration=100000ep", "log.every=1st", "device=cpu", "evaluate.every=null", "seed=1,2,3"]
    sweep = Warm([*arguments, f"search.parallel={at_a_time}"], Path.cwd(), dict(os.environ))
    deadline = time.monotonic() + 60
    while len([file for file in Path().glob("runs/*/seed=*/metrics.jsonl") if file.stat().st_size]) < at_a_time:
        assert time.monotonic() < deadline
        assert sweep.poll() is None
        time.sleep(0.05)
    if ctrl_c:
        os.killpg(sweep.pid, signal.SIGINT)  # like a terminal, to the foreground process group
    else:
        sweep.send_signal(signal.SIGTERM)
    printed, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 75, errors
    assert "(run the same command to resume)" in printed
    outcomes = list(Path().glob("runs/*/*/outcome.json"))
    assert [json.loads(outcome.read_text())["state"] for outcome in outcomes] == ["stopped"] * at_a_time
    states = ["stopped"] * at_a_time + ["—"] * (3 - at_a_time)
    assert [line.split()[:2] for line in printed.splitlines()[-5:-2]] == [
        [str(seed), state] for seed, state in enumerate(states, 1)
    ]


def test_the_report_of_torchrun_repeats_the_rejection(tmp_path: Path) -> None:
    """torchrun prints its own report after our message, so the report has to contain the message, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(ROOT / "launch.py"), "seed=x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\nisobatch: seed=x") + done.stderr.startswith("isobatch: seed=x") == 1
    assert "isobatch: seed=x" in done.stderr.splitlines()[-2]


def test_a_python_without_the_packages_is_told_how_to_install_them() -> None:
    done = subprocess.run([sys.executable, "-S", "launch.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert all(named in done.stderr for named in (sys.executable, "make train", "source .venv/bin/activate"))
