"""Test the Python API in scripts that run in their own processes, forked from a warm one unless they test imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm import Warm

ROOT = Path(__file__).parents[2]
QUICK = ("duration=4st", "batch.global_size=16", "lr.peak=0.1", "device=cpu", "log.every=1st")
TASK = '''
import os, signal, time, torch
from torch.utils.data import TensorDataset

class Mine:
    """A regression with ``fault`` in the ``at``-th loss, unless the file ``fixed`` exists."""

    def __init__(self, fault="", at=3):
        self.fault, self.at, self.calls = fault, at, 0

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))

    def train_data(self):
        inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    val_data = train_data

    def loss(self, model, batch):
        inputs, targets = batch
        if model.training:
            self.calls += 1
        if self.calls == self.at and not os.path.exists("fixed"):
            if self.fault == "crash":
                raise KeyError("meant to")
            if self.fault == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if self.fault == "moved":
                os.rename("run", "moved")
                os.mkdir("run")
                open("run/mine", "w").close()
                time.sleep(4)
        return ((model(inputs) - targets) ** 2).mean(1)
'''


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)


def script(text: str, cold: bool = False) -> dict[str, Any]:
    """Run ``text`` as a script that sets ``answer`` to a dictionary, and return that."""
    file = Path("script.py").absolute()
    file.write_text(
        f"QUICK = {QUICK!r}\n{textwrap.dedent(text)}\nimport json; open('answer', 'w').write(json.dumps(answer))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if cold:
        done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=180)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        process = Warm([], Path.cwd(), env, program=str(file))
        out, err = process.communicate(timeout=180)
        code = process.returncode
    assert code == 0, out + err
    answer: dict[str, Any] = json.loads(Path("answer").read_text())
    return answer | {"out": out, "err": err}


def launch(*words: str) -> str:
    process = Warm(list(words), Path.cwd(), dict(os.environ))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def test_importing_isobatch_changes_no_state() -> None:
    """The same holds for its names that are imported on first use."""
    answer = script(
        """
        import gc, os, signal, sys
        def state():
            handlers = {number: str(signal.getsignal(number)) for number in signal.valid_signals()}
            return [handlers, gc.isenabled(), gc.get_freeze_count(), dict(os.environ), list(sys.path)]
        before = state()
        import isobatch
        heavy = [name for name in ("torch", "hydra", "pydantic", "numpy") if name in sys.modules]
        from isobatch import UserError, train
        answer = {"same": state() == before, "heavy": heavy, "torch": "torch" in sys.modules, "dir": dir(isobatch)}
    """,
        cold=True,
    )
    assert answer["same"]
    assert answer["heavy"] == []
    assert not answer["torch"]
    assert {"train", "plan", "load", "history", "UserError", "Result"} <= set(answer["dir"])


def test_a_class_of_the_script_trains_in_its_process() -> None:
    answer = script(
        TASK
        + textwrap.dedent("""
        import isobatch
        import os
        Mine.where = []
        made = Mine.__init__
        def counted(self):
            made(self)
            self.where.append(os.getpid())
        Mine.__init__ = counted
        result = isobatch.train(Mine, *QUICK)
        task, model = isobatch.load(result.directory, Mine)
        answer = {
            "state": result.state, "directory": str(result.directory), "metrics": result.metrics,
            "here": os.getpid() in Mine.where, "history": isobatch.history(result.directory),
            "training": model.training, "task": type(task).__name__,
            "loss": task.loss(model, task.train_data().tensors).mean().item(),
        }
    """)
    )
    assert answer["state"] == "finished"
    assert answer["here"]
    lines = Path(answer["directory"], "metrics.jsonl").read_text().splitlines()
    assert answer["history"] == [json.loads(line) for line in lines]
    assert answer["metrics"]["step"] == 4
    assert answer["metrics"]["val/loss"] == pytest.approx(answer["loss"], abs=1e-6)
    assert answer["training"] is False
    assert "Isobatch plan" in answer["out"]
    assert "step 4/4" in answer["out"]
    assert "finished after 4 steps" in answer["out"]
    start = next(line for line in Path(answer["directory"], "events.jsonl").read_text().splitlines() if "start" in line)
    assert json.loads(start)["command"].startswith("isobatch.train('__main__.Mine', 'duration=4st'")


def test_api_and_command_line_give_the_same_run() -> None:
    """Their weights are equal bit for bit, and the command shows the result of the API's run."""
    answer = script("""
        import isobatch
        result = isobatch.train("mine.Mine", *QUICK, "lr.gamma=0.5")
        answer = {"directory": str(result.directory), "metrics": result.metrics}
    """)
    assert answer["err"].count("lr.gamma") == 1  # which has no effect
    words = ("task=custom", "task._target_=mine.Mine", *QUICK, "lr.gamma=0.5", "cluster.gpus_per_node=1")
    out = launch(*words)
    assert f"{answer['directory']} (run.new=true trains again)" in out
    launch(*words, "run.dir=other")
    weights = [Path(folder, "final/model.safetensors").read_bytes() for folder in (answer["directory"], "other")]
    assert weights[0] == weights[1]


def test_training_restores_the_state_of_the_process() -> None:
    """Four trainings, with a run that is extended and one that changes the most, leave every setting unchanged."""
    answer = script(
        """
        import gc, os, random, signal, sys, threading
        import numpy, torch
        import isobatch
        from mine import Mine
        torch.set_num_threads(3)
        torch.manual_seed(5)
        os.environ["OMP_NUM_THREADS"] = "3"
        def state():
            return [
                {number: signal.getsignal(number) for number in signal.valid_signals()}, gc.isenabled(),
                gc.get_freeze_count(), dict(os.environ), list(sys.path), torch.get_num_threads(),
                torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                torch.distributed.is_initialized(), os.getcwd(),
            ]
        before = state()
        differ = []
        def train(*words):
            result = isobatch.train(Mine, *QUICK, *words)
            differ.append([number for number, (was, now) in enumerate(zip(before, state())) if was != now])
            return result
        bitwise = train("numerics=bitwise", "batch.per_gpu=8", "cluster.environment={MINE: 1}")
        first = train()
        longer = train("duration=8st", f"run.dir={first.directory}")
        again = train("duration=8st", f"run.dir={first.directory}")
        answer = {
            "differ": differ, "steps": [run.metrics["step"] for run in (bitwise, first, longer, again)],
            "threads": [thread.name for thread in threading.enumerate() if thread.name == "owner"],
        }
    """,
        cold=True,
    )
    assert answer["differ"] == [[], [], [], []]
    assert answer["steps"] == [4, 4, 8, 8]
    assert answer["threads"] == []


@pytest.mark.parametrize("kind", ["crash", "interrupt"])
def test_the_same_call_resumes_after_a_crash(kind: str) -> None:
    """The exception chains the cause, the directory is released, and the outcome records the state."""
    answer = script(f"""
        import json
        import isobatch
        from mine import Mine
        words = ("task.args.fault={kind}", "checkpoint.every=1st", *QUICK)
        try:
            isobatch.train(Mine, *words)
        except (RuntimeError, KeyboardInterrupt) as error:
            kind, cause = type(error).__name__, repr(error.__cause__)
        (run,) = __import__("pathlib").Path("runs").iterdir()
        outcome = json.loads((run / "outcome.json").read_text())
        open("fixed", "w").close()
        result = isobatch.train(Mine, *words)
        answer = {{"kind": kind, "cause": cause, "outcome": outcome, "state": result.state}}
    """)
    expected = {"crash": ("RuntimeError", "KeyError('meant to')", "crashed")}
    expected["interrupt"] = ("KeyboardInterrupt", "None", "stopped")
    assert (answer["kind"], answer["cause"], answer["outcome"]["state"]) == expected[kind]
    assert answer["state"] == "finished"


def test_a_run_never_writes_into_a_directory_that_replaced_its_own() -> None:
    """The run ends with an error, and the caller's process continues."""
    answer = script("""
        import isobatch
        from mine import Mine
        try:
            isobatch.train(Mine, "task.args.fault=moved", "checkpoint.every=1st", "run.dir=run", *QUICK)
        except RuntimeError as error:
            answer = {"error": str(error)}
    """)
    assert "was moved to" in answer["error"]
    assert os.listdir("run") == ["mine"]
    assert json.loads(Path("moved/outcome.json").read_text())["state"] == "crashed"


REJECTED = {
    "a typo": ("isobatch.train(Mine, 'batch.gobal_size=16')", "batch.gobal_size"),
    "an override in place of the task": ("isobatch.train('batch.global_size=16')", "give the task or None first"),
    "a class inside a function": ("isobatch.train((lambda: type('Task', (), {}))())", "isn't the class that was given"),
    "a class of the script, in two processes": (
        "isobatch.train(type(Here()), *QUICK, 'cluster.gpus_per_node=2')", "other processes can't import it"
    ),
    "a job": ("isobatch.train(Mine, *QUICK, 'cluster=slurm', 'cluster.gpus_per_node=1')", "cluster=slurm"),
    "another action": ("isobatch.train(Mine, *QUICK, 'action=plan')", "action=plan"),
    "a wrong task": ("isobatch.train('mine.Mien', *QUICK)", "did you mean mine.Mine?"),
    "a wrong argument in two processes": (
        "isobatch.train(Mine, *QUICK, 'task.args.faut=crash', 'cluster.gpus_per_node=2')", "fault"
    ),
    "a folder without a run": ("isobatch.load('nowhere')", "nowhere holds no run"),
    "the history of a folder without a run": ("isobatch.history('nowhere')", "nowhere holds no run"),
    "an object in place of the class": ("isobatch.train(Here(), *QUICK)", "not a class"),
    "an impossible plan": ("isobatch.plan('batch.global_size=-1')", "batch.global_size"),
}  # fmt: skip


def test_rejected_calls_raise_user_error() -> None:
    answer = script(f"""
        import isobatch
        from mine import Mine
        class Here(Mine): ...
        answer = {{}}
        for name, (call, _) in {REJECTED!r}.items():
            try:
                answer[name] = repr(eval(call))
            except isobatch.UserError as error:
                answer[name] = str(error)
    """)
    for name, (_, expected) in REJECTED.items():
        assert expected in answer[name], name
    assert not Path("runs").exists()


def test_several_workers_find_the_task_of_the_caller() -> None:
    """They run in their own processes with the caller's sys.path, and their output and errors are relayed."""
    Path("elsewhere").mkdir()
    Path("mine.py").rename("elsewhere/mine.py")
    answer = script("""
        import sys
        import isobatch
        sys.path.append("elsewhere")
        from mine import Mine
        two = (*QUICK, "cluster.gpus_per_node=2")
        result = isobatch.train(Mine, *two, "lr.gamma=0.5")
        try:
            isobatch.train(Mine, *two, "task.args.fault=crash", "task.args.at=3")
        except RuntimeError as error:
            crash = str(error)
        answer = {"state": result.state, "step": result.metrics["step"], "crash": crash}
    """)
    assert answer["state"] == "finished"
    assert answer["step"] == 4
    assert "training on 2 ranks" in answer["out"]
    assert (answer["out"] + answer["err"]).count("lr.gamma") == 1  # which has no effect
    assert "KeyError: 'meant to'" in answer["crash"]


def test_plan_equals_that_of_the_command_and_imports_no_torch() -> None:
    words = ("batch.global_size=4096", "cluster.nodes=16", "cluster.gpus_per_node=8")
    answer = script(
        f"""
        import sys
        import isobatch
        from isobatch.scaling.report.plan_json import to_json
        plan = isobatch.plan(*{words!r})
        answer = {{"plan": to_json(plan), "torch": "torch" in sys.modules, "world": plan.world}}
        own = ("task=custom", "task._target_=mine.Mine", "lr.peak=1", "batch.global_size=all", "plan.open_data=true")
        answer["all"] = isobatch.plan(*own, "lr.gamma=0.5").stages[0].cut.global_size
    """,
        cold=True,
    )
    assert answer["err"].count("lr.gamma") == 1  # which has no effect
    assert answer["world"] == 128
    assert answer["all"] == 64
    assert not answer["torch"]
    assert answer["plan"].strip() == launch(*words, "action=plan", "output=json").strip()


def test_training_inside_a_hydra_program_leaves_its_config_alone() -> None:
    Path("theirs").mkdir()
    Path("theirs/other.yaml").write_text("a: 2\n")
    Path("theirs/main.yaml").write_text("a: 1\nhydra: {run: {dir: .}, output_subdir: null}\n")
    answer = script(
        """
        import hydra, os
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig
        answer = {}
        @hydra.main(version_base="1.2", config_path="theirs", config_name="main")
        def main(cfg):
            import isobatch
            before = GlobalHydra.instance().hydra
            answer["state"] = isobatch.train("mine.Mine", *QUICK).state
            answer["same"] = GlobalHydra.instance().hydra is before and hydra.version.getbase().minor == 2
            answer["theirs"] = [cfg.a, hydra.compose("other").a, HydraConfig.get().job.name]
        main()
    """,
        cold=True,
    )
    assert answer["state"] == "finished"
    assert answer["same"]
    assert answer["theirs"] == [1, 2, "script"]


def test_a_task_beside_the_config_dir_is_found() -> None:
    """The task isn't in the working directory."""
    Path("project/configs/task").mkdir(parents=True)
    Path("mine.py").rename("project/mine.py")
    yaml = "defaults: [custom, _self_]\nname: beside\n_target_: mine.Mine\n"
    Path("project/configs/task/beside.yaml").write_text(yaml)
    answer = script("""
        import isobatch
        there = {"config_dir": "project/configs"}
        result = isobatch.train(None, "task=beside", *QUICK, **there)
        two = isobatch.train(None, "task=beside", "seed=1", "cluster.gpus_per_node=2", *QUICK, **there)
        answer = {"states": [result.state, two.state]}
    """)
    assert answer["states"] == ["finished", "finished"]
