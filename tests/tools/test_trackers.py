"""Test trackers with real trainings that are killed, by reading back what the real packages stored."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import tracked

ROOT = Path(__file__).parents[2]
FOLLOW = "isobatch.trainers.trackers.follow"
ALL = ("tensorboard", "wandb", "mlflow", "trackio")
SLOW = """
import os, time
from isobatch.trainers.tasks.digits import Digits


class Slow(Digits):
    def loss(self, model, batch):
        time.sleep(0.02)
        if os.path.exists("crash"):
            raise ZeroDivisionError("crash")
        return super().loss(model, batch)
"""
PAGE = (ROOT / "trainers/trackers/README.md").read_text()
(SQLITE,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class SQLite" in code]
OWN = f"""
import os, time
{SQLITE}

class Hangs(SQLite):
    def write(self, line):
        while not os.path.exists("network"):
            time.sleep(0.1)
        super().write(line)


class TakesLong(SQLite):
    def write(self, line):
        time.sleep(0.25)
        super().write(line)


class Recovers(SQLite):
    def write(self, line):
        if not os.path.exists("network"):
            raise ConnectionError("no network")
        super().write(line)
"""
BASE = ("device=cpu", "log.every=5st", "checkpoint.every=40st", "evaluate.every=40st", "run.dir=run")
SLOWLY = ("task=digits", "task._target_=slow.Slow", *BASE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a slow task and trackers of one's own."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "own.py").write_text(OWN)
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def start(folder: Path, *words: str, command: tuple[str, ...] = (str(ROOT / "launch.py"),)) -> subprocess.Popen[str]:
    """Start a training in ``folder``."""
    out = open(folder / "out.txt", "w")  # noqa: SIM115
    return subprocess.Popen([sys.executable, *command, *words], cwd=folder, stdout=out, stderr=out, text=True)


def train(folder: Path, *words: str) -> str:
    """Train to the end, and return what was printed."""
    assert start(folder, *words).wait(120) == 0, (folder / "out.txt").read_text()
    return (folder / "out.txt").read_text()


def steps(run: Path) -> int:
    """Return the last logged step; 0 where there is none."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def until(condition: Callable[[], Any], within_s: float = 90.0) -> Any:
    """Wait for a condition, and return its value."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def followers(run: Path) -> dict[str, int]:
    """Return the process id of each tracker's follower of ``run``."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, cwd = (entry / "cmdline").read_text().split("\0"), os.readlink(entry / "cwd")
        except OSError:
            continue
        if FOLLOW in words and Path(cwd) == run.parent:
            found[words[words.index(FOLLOW) + 2]] = int(entry.name)
    return found


def warnings(run: Path) -> list[str]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["text"] for event in events if event["event"] == "warning" and "tracker" in event]


def stored(folder: Path, name: str) -> tracked.Steps:
    """Return what a tracker has."""
    run = folder / "run"
    read: dict[str, Callable[[], tracked.Steps]] = {
        "tensorboard": lambda: tracked.tensorboard(run),
        "wandb": lambda: tracked.wandb(run),
        "mlflow": lambda: tracked.mlflow(f"sqlite:///{folder}/mlflow.db", run),
        "trackio": lambda: tracked.trackio("digits", run),
    }
    return read[name]()


@pytest.fixture
def in_store(folder: Path) -> None:
    """Let Trackio's package in this process read this test's folder, which it looks up once, when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


@pytest.mark.usefixtures("in_store")
def test_one_run_with_each_step_once_after_kills_of_everything(folder: Path) -> None:
    """Kill the launcher between two checkpoints, then each follower; resume on other hardware; extend the run."""
    run, trackers = folder / "run", f"log.to=[{','.join(ALL)}]"
    process = start(folder, *SLOWLY, "duration=140st", trackers)
    until(lambda: len(followers(run)) == 4)
    until(lambda: steps(run) >= 60)  # beyond the checkpoint of step 40
    process.kill()
    process.wait()
    until(lambda: not followers(run), 5)

    process = start(folder, "run.dir=run", "cluster.gpus_per_node=2", "log.every=5st")
    until(lambda: "resuming from step" in (folder / "out.txt").read_text())
    for name in ALL:
        pid = until(lambda name=name: followers(run).get(name))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(pid, number)
        time.sleep(0.1)
        assert followers(run).get(name) == pid  # which ends with the training only
        os.kill(pid, signal.SIGKILL)
    assert process.wait(120) == 0, (folder / "out.txt").read_text()
    assert not followers(run)
    for name in ALL:
        assert tracked.same(stored(folder, name), run), name

    train(folder, "run.dir=run", "duration=160st")
    assert steps(run) == 160
    for name in ALL:
        assert tracked.same(stored(folder, name), run), name


@pytest.mark.usefixtures("in_store")
@pytest.mark.parametrize("name", ALL)
def test_a_kill_between_any_two_writes(folder: Path, name: str) -> None:
    """Send a finished run to a tracker by hand, killed several times on the way."""
    run = folder / "run"
    train(folder, "task=digits", *BASE, "duration=300st")
    command = [sys.executable, "-P", "-m", FOLLOW, "run", name]
    began = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    took_s = time.monotonic() - began
    assert tracked.same(stored(folder, name), run)
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    draw = random.Random(name)
    for kept in (len(lines) // 3, len(lines) // 2, len(lines)):
        file.write_text("".join(lines[:kept]))
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took_s * draw.uniform(0.3, 1.0))
        process.kill()
        process.wait()
    file.write_text("".join(lines))
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    assert tracked.same(stored(folder, name), run)


def test_plan_and_config_are_sent_along(folder: Path) -> None:
    """Also the name of a sweep, in which the runs belong together."""
    words = ["task=digits", *BASE[:-1], "duration=20st", "log.to=[wandb,mlflow]", "log.args.wandb.project=mine"]
    train(folder, "-m", *words, "seed=1,2", "log.args.mlflow={experiment: mine, tags: {by: me}}")
    runs = sorted(path.parent for path in folder.glob("runs/*/*/metrics.jsonl"))
    assert len(runs) == 2
    for run in runs:
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        sent = next(record.run for record in tracked.wandb_records(file) if record.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in sent.config.update}
        assert config["config"]["seed"] == int(run.name.removeprefix("seed="))
        assert config["plan"]["steps"] == 20
        assert (sent.project, sent.run_group, sent.display_name) == ("mine", run.parent.name, run.name)
        client, found = tracked.mlflow_run(f"sqlite:///{folder}/mlflow.db", run)
        assert client.get_experiment(found.info.experiment_id).name == "mine"
        assert found.data.params["config/seed"] == run.name.removeprefix("seed=")
        assert found.data.params["plan/steps"] == "20"
        assert (found.data.tags["by"], found.data.tags["isobatch.sweep"]) == ("me", run.parent.name)
        assert found.info.status == "FINISHED"


def test_a_broken_tracker_is_named_with_its_cause_and_the_other_is_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server answers at MLflow's address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run, store = folder / "run", "log.args.mlflow.tracking_uri=http://127.0.0.1:9"
    printed = train(folder, *SLOWLY, "duration=150st", "log.to=[tensorboard,mlflow]", store)
    assert tracked.same(tracked.tensorboard(run), run)
    *first, last = warnings(run)
    assert "mlflow was given up" in last
    assert ["mlflow failed" in text for text in first] in ([True], [])  # none where it first failed at the end
    assert all("127.0.0.1" in text and "run/logs/tracker-mlflow.log" in text for text in (*first, last))
    assert all(text in printed for text in (*first, last))
    assert "Traceback" not in printed


def test_a_tracker_that_recovers_is_complete(folder: Path) -> None:
    """Lines that failed to be sent are sent once the tracker is back, in the same attempt."""
    run = folder / "run"
    process = start(folder, *SLOWLY, "duration=200st", "log._target_=own.Recovers", "log.args.path=own.db")
    until(lambda: run.exists() and (run / "events.jsonl").exists() and warnings(run))
    (folder / "network").touch()
    assert process.wait(120) == 0
    assert own(folder) == tracked.logged(run)
    assert len(warnings(run)) == 1


def test_a_hanging_tracker_delays_no_stop(folder: Path) -> None:
    run = folder / "run"
    words = [*SLOWLY, "duration=100000st", "log.to=tensorboard", "log._target_=own.Hangs", "log.args.path=own.db"]
    process = start(folder, *words)
    until(lambda: steps(run) >= 60)
    began = time.monotonic()
    process.terminate()
    assert process.wait(60) == 75
    assert time.monotonic() - began < 30
    assert json.loads((run / "outcome.json").read_text())["state"] == "stopped"
    assert not followers(run)
    assert tracked.same(tracked.tensorboard(run), run)
    assert ["custom was given up" in text for text in warnings(run)] == [True]


def test_a_hanging_tracker_is_given_up_at_the_end(folder: Path) -> None:
    """The other one is complete, and the outcome is recorded before the wait. The printed command sends the rest."""
    words = ("task=digits", *BASE, "duration=20st", "log.to=tensorboard")
    process, run = start(folder, command=impatient(*words, "log._target_=own.Hangs")), folder / "run"
    until(lambda: (run / "outcome.json").exists() and "finished" in (run / "outcome.json").read_text())
    assert process.poll() is None
    assert process.wait(60) == 0
    assert (folder / "out.txt").read_text().endswith("finished\n")
    assert not followers(run)
    assert tracked.same(tracked.tensorboard(run), run)
    (text,) = warnings(run)
    assert "custom was given up" in text
    (folder / "network").touch()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(text.partition("send the rest by: ")[2], shell=True, cwd="/", env=env, check=True)
    assert own(folder) == tracked.logged(run)


def impatient(*words: str) -> tuple[str, ...]:
    """Return the command that trains with one worker and a tracker of one's own, and waits 5 s for its progress."""
    words = (*words, "log.args.path=own.db", "cluster.gpus_per_node=1")
    return (
        "-c",
        f"""
import isobatch, isobatch.trainers.trackers.followers as followers
followers.IDLE_S = 5.0
print(isobatch.train(None, *{words!r}).state)
""",
    )


def test_a_tracker_that_takes_long_is_not_given_up_while_it_progresses(folder: Path) -> None:
    words = (*SLOWLY, "log.every=2st", "duration=80st", "log._target_=own.TakesLong")
    process = start(folder, command=impatient(*words))
    assert process.wait(120) == 0, (folder / "out.txt").read_text()
    assert own(folder) == tracked.logged(folder / "run")
    assert not warnings(folder / "run")


@pytest.mark.usefixtures("in_store")
def test_a_crash_of_the_training_loses_no_line(folder: Path) -> None:
    """Each tracker has all lines that it may have, and knows that the run failed."""
    run = folder / "run"
    process = start(folder, *SLOWLY, "duration=100000st", f"log.to=[{','.join(ALL)}]")
    until(lambda: len(followers(run)) == 4)
    until(lambda: in_mlflow(folder) and [*run.glob("wandb/*/*.wandb")] and [*folder.glob("trackio/*.db")])
    (folder / "crash").touch()
    assert process.wait(60) == 1, (folder / "out.txt").read_text()
    assert not warnings(run)
    for name in ("tensorboard", "wandb", "trackio"):
        assert tracked.same(stored(folder, name), run), name
    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert stored(folder, "mlflow").keys() == {step for step in tracked.logged(run) if step < saved}
    assert tracked.mlflow_run(f"sqlite:///{folder}/mlflow.db", run)[1].info.status == "FAILED"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    records = tracked.wandb_records(file)
    assert [one.exit.exit_code for one in records if one.WhichOneof("record_type") == "exit"] == [1]


def in_mlflow(folder: Path) -> int:
    """Return how many metrics MLflow's store has; 0 where it isn't made yet."""
    with suppress(sqlite3.OperationalError), sqlite3.connect(f"file:{folder}/mlflow.db?mode=ro", uri=True) as db:
        return int(db.execute("select count(*) from metrics").fetchone()[0])
    return 0


def test_an_old_run_is_sent_by_hand(folder: Path) -> None:
    """It was made before there were trackers. What can't be sent is named."""
    shutil.copytree(ROOT / "tests/data/f0a1b05/digits-da51d6fd3c73", folder / "run", symlinks=True)
    command = [sys.executable, "-P", "-m", FOLLOW]
    subprocess.run([*command, "run", "tensorboard"], cwd=folder, check=True)
    assert tracked.same(tracked.tensorboard(folder / "run"), folder / "run")
    for words, named in ([("run", "tensorbord"), "tensorboard, wandb"], [("nothing", "wandb"), "nothing"]):
        done = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert named in done.stderr
        assert "Traceback" not in done.stderr


def own(folder: Path) -> tracked.Steps:
    """Return what the SQLite tracker has."""
    with sqlite3.connect(folder / "own.db") as db:
        made = db.execute("select count(*) from sqlite_master").fetchone()[0]
        lines = [json.loads(line) for (line,) in db.execute("select line from lines")] if made else []
    return {line.pop("step"): {key: value for key, value in line.items() if value is not None} for line in lines}


def test_ones_own_tracker_gets_only_lines_that_a_resume_cannot_lose(folder: Path) -> None:
    run, tracker = folder / "run", ("log._target_=own.SQLite", "log.args.path=own.db")
    process = start(folder, *SLOWLY, "duration=400st", *tracker)
    until(lambda: (folder / "own.db").exists() and own(folder))
    process.kill()
    process.wait()
    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert 0 < max(own(folder)) < saved
    train(folder, "run.dir=run")
    assert own(folder) == tracked.logged(run)


def test_from_python_in_the_debugger_and_under_torchrun(folder: Path) -> None:
    words = ("task=digits", *BASE[:-1], "duration=20st", "log.to=tensorboard")
    script = f"import isobatch; print(isobatch.train(None, *{words!r}, 'run.dir=api', 'cluster.gpus_per_node=1'))"
    ranks, launch = ("-m", "torch.distributed.run", "--nproc-per-node=2"), str(ROOT / "launch.py")
    commands = {
        "api": ("-c", script),
        "debug": (launch, *words, "run.dir=debug", "debug=true"),
        "torchrun": (*ranks, launch, *words, "run.dir=torchrun"),
    }
    for name, command in commands.items():
        assert start(folder, command=command).wait(120) == 0, (folder / "out.txt").read_text()
        assert tracked.same(tracked.tensorboard(folder / name), folder / name)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["log.to=wandb"], ["wandb", "isobatch[wandb]"]),
        (["log._target_=own.Missing"], ["log._target_", "own has no Missing"]),
        (["log._target_=own.SQLite", "log.args.file=x"], ["log.args", "path"]),
        (["log._target_=slow.Slow"], ["log._target_", "open", "write", "close"]),
    ],
)
def test_what_can_not_work_is_rejected_before_training(folder: Path, words: list[str], named: list[str]) -> None:
    """A package counts as missing where Python can't import it."""
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
    assert start(folder, "task=digits", *BASE, *words).wait(60) == 2
    printed = (folder / "out.txt").read_text()
    assert all(name in printed for name in named), printed
    assert not (folder / "run/metrics.jsonl").exists()
