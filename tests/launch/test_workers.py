"""Test workers end to end: real commands, real signals, and no processes left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import LAUNCH, processes_of, soak
from tests.support.warm import Warm

FAULTY = '''
import ctypes, multiprocessing, os, resource, signal, sys, time
import torch
import isobatch.trainers.run
from torch.utils.data import TensorDataset
from isobatch.scaling.errors import UserError


SAMPLE_BYTES = 64 << 20


class Task:
    """A regression with ``fault`` in the third loss of rank ``rank``, at the first start or ``always``."""

    def __init__(self, fault="", rank=1, always=True, sleep=0.0, fits=0):
        self.fault, self.sleep, self.fits, self.calls = fault, sleep, fits, 0
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.here = int(os.environ.get("RANK", "0")) == rank and (always or not restarted)
        print("task of rank", os.environ.get("RANK"), "threads", torch.get_num_threads(), flush=True)
        os.write(2, b"and this past Python\\n")
        if fault == "refuses early" and self.here:
            raise UserError("not with me")

    def model(self):
        if self.fault == "hangs early" and self.here:
            time.sleep(1000)
        return torch.nn.Linear(4, 1)

    def train_data(self):
        if self.fault == "never opens":
            time.sleep(1000)
        inputs = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def loss(self, model, batch):
        self.calls += 1
        time.sleep(self.sleep)
        inputs, targets = batch
        loss = ((model(inputs) - targets) ** 2).sum()
        if self.here and self.calls == 3:
            match self.fault:
                case "raises":
                    raise ValueError("boom")
                case "refuses":
                    raise UserError("not with me")
                case "not finite":
                    loss = loss * float("nan")
                case "exits":
                    os._exit(7)
                case "breaks":
                    breakpoint()
                case "hangs":
                    time.sleep(1000)
                case "hangs with the lock":  # the interpreter's lock, so no other thread of this process can run
                    open("hangs", "w").close()
                    holding, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
                    while True:
                        holding.pthread_mutex_lock(mutex)
                case "fails at the end":
                    isobatch.trainers.run.save_final = lambda *_, **__: 1 / 0
                case "loses its loader":
                    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                case "runs out of memory":  # with room for ``fits`` samples and a half
                    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                    most = used + int((self.fits + 0.5) * SAMPLE_BYTES)
                    resource.setrlimit(resource.RLIMIT_AS, (most, most))
                case name if name.startswith("SIG"):
                    os.kill(os.getpid(), signal.Signals[name])
        if self.here and self.fault == "runs out of memory":
            torch.empty(len(inputs) * SAMPLE_BYTES, dtype=torch.uint8)
        return loss, len(inputs)
'''
BASE = ["task=custom", "task._target_=faulty.Task", "device=cpu", "duration=20st", "batch.global_size=64"]
LONG = ["duration=100000st", "task.args.sleep=0.01"]
RESTARTED = ["checkpoint.every=1st", "cluster.max_restarts=1"]
DEADLINE_S = 120.0  # after which a command counts as hung; on a busy machine some commands take 30 s


class Run:
    """A command in its own folder, and its run directory."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        stdin: str | None = None,
        warm: str = "",
        **env: str,
    ) -> None:
        self.folder, self.dir = folder, folder / "run"
        command, env = [*command, f"run.dir={self.dir}"], {**os.environ, **env}
        self.process = Warm(command, folder, env, program=warm) if warm else started(command, folder, env, stdin)
        self._stdin, self.out, self.err = stdin, "", ""

    def end(self) -> int:
        """Wait for the end, and return the exit code. Fail the test if the command hangs."""
        try:
            self.out, self.err = self.process.communicate(self._stdin, timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"hangs:\n{self.out}\n{self.err}")
        return self.process.returncode

    def kill(self) -> None:
        for pid in {self.process.pid, *processes_of(self.dir)}:
            os.kill(pid, signal.SIGKILL)
        self.out, self.err = self.process.communicate()

    def await_training(self, starts: int = 1) -> None:
        wait_until(lambda: len(self.events("start")) >= starts and (self.dir / "metrics.jsonl").exists())

    def events(self, name: str) -> list[dict[str, Any]]:
        file = self.dir / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    @property
    def outcome(self) -> dict[str, Any]:
        return json.loads((self.dir / "outcome.json").read_text())

    @property
    def messages(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("isobatch: ")]

    def log(self, rank: int) -> str:
        return (self.dir / "logs" / f"rank-{rank}.log").read_text()


def started(command: list[str], folder: Path, env: dict[str, str], stdin: str | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], Any], within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    (tmp_path / "faulty.py").write_text(FAULTY)
    yield tmp_path
    wait_until(lambda: not processes_of(tmp_path), within_s=6)  # data loaders check for their parent every 5 s


def launch(folder: Path, *overrides: str, ranks: int = 2) -> Run:
    return Run(folder, [*BASE, f"cluster.gpus_per_node={ranks}", *overrides], warm=str(LAUNCH))


def launch_cold(folder: Path, *overrides: str, ranks: int = 2, **more: Any) -> Run:
    """Launch in a new process, for tests in which importing torch or the environment before it matters."""
    command = [sys.executable, str(LAUNCH), *BASE, f"cluster.gpus_per_node={ranks}", *overrides]
    return Run(folder, command, **more)


def launch_after(folder: Path, code: str, *overrides: str) -> Run:
    """Launch in a process that has executed ``code``."""
    script = folder / "script.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(LAUNCH.parent)!r})\n"
        f"{code}"
        "if __name__ == '__main__':\n"
        f"    sys.argv[0] = {str(LAUNCH)!r}\n"
        f"    runpy.run_path({str(LAUNCH)!r}, run_name='__main__')\n"
    )
    return Run(folder, [sys.executable, str(script), *BASE, "cluster.gpus_per_node=2", *overrides])


def torchrun(folder: Path, *overrides: str, options: tuple[str, ...] = ("--standalone",), workers: int = 2) -> Run:
    return Run(folder, [*options, f"--nproc-per-node={workers}", str(LAUNCH), *BASE, *overrides], warm="torchrun")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def two_machines(folder: Path, *overrides: str) -> list[Run]:
    meeting = f"cluster.rendezvous=127.0.0.1:{free_port()}"
    return [launch(folder, "cluster.nodes=2", meeting, *overrides, ranks=1) for _ in range(2)]


# ---- starts and ends


def test_soak_counts_starts_and_ends() -> None:
    tally = soak("python launch.py", 1, DEADLINE_S)
    assert tally.clean, tally
    assert tally.ends == {"finished": 1}


def test_rank_0_prints_to_the_terminal_and_other_ranks_to_logs(folder: Path) -> None:
    run = launch(folder, ranks=3)
    assert run.end() == 0
    assert run.outcome["state"] == "finished"
    for rank in (1, 2):
        assert f"task of rank {rank}" in run.log(rank)
        assert "and this past Python" in run.log(rank)
        assert f"task of rank {rank}" not in run.out
    assert "task of rank 0" in run.out
    assert run.err == "and this past Python\n"


def test_cores_are_shared_by_the_workers(folder: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    run = launch_cold(folder, "duration=1st", ranks=1, OMP_NUM_THREADS="")
    assert run.end() == 0
    assert f"task of rank 0 threads {cores}" in run.out


def test_workers_are_spawned_where_cuda_is_initialised(folder: Path) -> None:
    """An initialised CUDA doesn't survive a fork."""
    run = launch_after(folder, "import torch\ntorch.cuda.is_initialized = lambda: True\n")
    assert run.end() == 0, run.err
    assert run.outcome["state"] == "finished"
    assert "task of rank 1" in run.log(1)


def test_environment_reaches_the_workers(folder: Path) -> None:
    (folder / "faulty.py").write_text(FAULTY + "\nprint('MINE is', os.environ.get('MINE'), flush=True)\n")
    run = launch_cold(folder, "cluster.environment.MINE=7", "duration=1st", OMP_NUM_THREADS="3")
    assert run.end() == 0
    assert "MINE is 7" in run.out
    assert "task of rank 0 threads 3" in run.out
    assert "MINE is 7" in run.log(1)


def test_data_loaders_end_with_their_workers(folder: Path) -> None:
    run = launch(folder, "data.workers=1", "task.args.fault=raises")
    assert run.end() == 1
    wait_until(lambda: not processes_of(run.dir), within_s=1)


def test_a_second_launch_leaves_the_first_alone(folder: Path) -> None:
    first = launch(folder, *LONG)
    first.await_training()
    second = launch(folder, *LONG)
    assert second.end() == 2
    assert len(second.messages) == 1
    assert "another launch works in" in second.messages[0]
    assert first.outcome["state"] == "running"
    assert not list(first.dir.glob("logs/error*"))
    first.process.terminate()
    assert first.end() == 75


# ---- debug


def test_debug_allows_breakpoints_in_the_launcher(folder: Path) -> None:
    fault = ("task.args.fault=breaks", "task.args.rank=0")
    run = launch_cold(folder, "debug=true", *fault, ranks=1, stdin="p 6 * 7\nc\n")
    assert run.end() == 0, run.err
    assert "(Pdb) 42" in run.out
    assert run.outcome["state"] == "finished"


def test_debug_shows_the_traceback(folder: Path) -> None:
    run = launch(folder, "debug=true", "task.args.fault=raises", "task.args.rank=0", ranks=1)
    assert run.end() == 1
    assert 'raise ValueError("boom")' in run.err
    assert run.outcome["state"] == "crashed"


# ---- errors

CRASHES = {
    "raises": r"rank 1 crashed: ValueError: boom",
    "exits": r"rank 1 crashed: exited with 7",
    "SIGKILL": r"rank 1 crashed: killed by SIGKILL",
    "SIGSEGV": r"rank 1 crashed: killed by SIGSEGV",
    "not finite": r"step 3 \(.*\) isn't finite.*learning rate.*clip_norm.*on_nonfinite=skip",
}


@pytest.mark.parametrize("fault", CRASHES)
def test_the_first_error_is_printed_once(folder: Path, fault: str) -> None:
    run = launch(folder, f"task.args.fault='{fault}'")
    assert run.end() == 1
    assert len(run.messages) == 1
    assert re.search(CRASHES[fault], run.messages[0]), run.messages
    assert "Traceback" not in run.err + run.out
    assert "elastic" not in run.err + run.out
    end = run.outcome
    assert end["state"] == "crashed"
    assert re.search(CRASHES[fault], end["cause"])
    assert (end["step"], end["samples"]) in ((2, 128), (3, 192))


def test_the_log_has_the_traceback(folder: Path) -> None:
    run = launch(folder, "task.args.fault=raises")
    assert run.end() == 1
    assert 'raise ValueError("boom")' in run.log(1)
    assert f"traceback in {run.dir}/logs/rank-1.log" in run.messages[0]
    error = json.loads((run.dir / "logs/error-rank-1.json").read_text())
    assert error["rank"] == 1
    assert error["kind"] == "crashed"
    assert error["attempt"] == run.outcome["attempt"]
    assert 'raise ValueError("boom")' in error["traceback"]


@pytest.mark.parametrize("fault", ["refuses", "refuses early"])
def test_a_refusal_of_one_rank_ends_all_ranks_without_a_restart(folder: Path, fault: str) -> None:
    (folder / "run").mkdir()  # else it would be removed
    run = launch(folder, f"task.args.fault='{fault}'", "cluster.max_restarts=3")
    began = time.monotonic()
    assert run.end() == 2
    assert time.monotonic() - began < 20
    assert run.messages == ["isobatch: not with me"]
    assert run.outcome["state"] == "refused"
    assert run.outcome["cause"] == "not with me"
    assert len(run.events("start")) == 1


def test_a_step_that_is_not_finite_is_not_restarted(folder: Path) -> None:
    run = launch(folder, "task.args.fault='not finite'", "cluster.max_restarts=3")
    assert run.end() == 1
    assert len(run.events("start")) == 1


# ---- hangs


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("hangs", r"it hung: no progress within cluster\.timeout_s=2 \(faulty\.py:\d+ in loss\)"),
        ("SIGSTOP", r"suspended .*"),
    ],
)
def test_a_hanging_rank_is_named_and_all_ranks_log_their_stacks(folder: Path, fault: str, cause: str) -> None:
    run = launch(folder, f"task.args.fault={fault}", "task.args.always=false", "cluster.timeout_s=2", *RESTARTED)
    assert run.end() == 0, run.err
    (restart,) = run.events("restart")
    assert re.fullmatch(cause, restart["cause"])
    assert (restart["rank"], restart["step"], restart["samples"]) == (1, 2, 128)
    assert re.search(r"faulty\.py\", line \d+ in loss", run.log(1))
    assert re.search(r"engine\.py\", line \d+ in backward", run.log(0))
    assert run.events("going_on")[0]["step"] in (1, 2)  # a save in progress is lost


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hang_before_the_first_step_is_found(folder: Path, ranks: int) -> None:
    """Rank 0 hangs while the model is built, with and without another rank that waits for it."""
    run = launch(folder, "task.args.fault='hangs early'", "task.args.rank=0", "cluster.timeout_s=4", ranks=ranks)
    assert run.end() == 1
    assert re.search(r"it hung: no progress within .* \(faulty\.py:\d+ in model\)", run.messages[0]), run.messages


def test_a_stop_ends_a_rank_that_cannot_react(folder: Path) -> None:
    """Not even the rank's watching thread can run. Its restart is given up, since the run has to stop."""
    run = launch(
        folder, "task.args.fault='hangs with the lock'", "task.args.rank=0", "cluster.timeout_s=2", *RESTARTED, ranks=1
    )
    wait_until(lambda: (folder / "hangs").exists())
    run.process.terminate()
    began = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - began < 15
    assert len(run.events("start")) == 1
    assert run.outcome["state"] == "crashed"
    assert run.outcome["cause"].startswith("rank 0 crashed: it hung: no sign of life within cluster.timeout_s=2")
    assert (run.outcome["step"], run.outcome["samples"]) == (2, 128)
    assert re.search(r"faulty\.py\", line \d+ in loss", run.log(0))


def test_a_suspended_job_continues(folder: Path) -> None:
    run = launch(folder, "cluster.timeout_s=2", "log.every=1st", *LONG)
    run.await_training()
    wait_until(lambda: len((run.dir / "metrics.jsonl").read_text().splitlines()) > 20)
    job = processes_of(run.dir)
    for number, then_s in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.5)):
        for pid in job:
            os.kill(pid, number)
        time.sleep(then_s)
    run.process.terminate()
    assert run.end() == 75, run.err


# ---- restarts


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_are_restarted_after_a_crash(folder: Path, rank: int) -> None:
    run = launch(
        folder, "task.args.fault=raises", f"task.args.rank={rank}", "task.args.always=false", "cluster.max_restarts=1"
    )
    assert run.end() == 0
    assert run.outcome["state"] == "finished"
    assert run.outcome["restarts"] == 1
    (restart,) = run.events("restart")
    assert restart["rank"] == rank
    assert re.fullmatch(r"ValueError: boom \(faulty\.py:\d+ in loss\)", restart["cause"])


def test_restarts_are_counted(folder: Path) -> None:
    """Each restart resumes from the last checkpoint, so it gets further."""
    run = launch(folder, "task.args.fault=SIGKILL", "checkpoint.every=1st", "cluster.max_restarts=2")
    assert run.end() == 1
    assert run.outcome["restarts"] == 2
    assert [event["restart"] for event in run.events("restart")] == [1, 2]
    begun = [0] + [event["step"] for event in run.events("going_on")]
    assert begun == sorted(set(begun))
    reached = [event["step"] for event in run.events("restart")] + [run.outcome["step"]]
    assert reached == [step + 2 for step in begun]
    assert run.outcome["samples"] == 64 * run.outcome["step"]
    assert ["restarting" in line for line in run.messages] == [True, True, False]


def test_workers_that_get_no_further_are_not_restarted(folder: Path) -> None:
    run = launch(folder, "task.args.fault=SIGKILL", "checkpoint.every=null", "cluster.max_restarts=5")
    assert run.end() == 1
    assert run.outcome["restarts"] == 1
    assert "killed by SIGKILL" in run.outcome["cause"]
    assert "the last start got no further than an earlier one" in run.messages[1]


@pytest.mark.parametrize(("code", "state"), [("os._exit(7)", "crashed"), ("raise UserError('not here')", "refused")])
def test_a_restart_that_ends_early_is_recorded(folder: Path, code: str, state: str) -> None:
    """Rank 1 ends while the ranks of the second start connect, before they open the run directory."""
    meets = (
        "import os\n"
        "from isobatch.scaling.errors import UserError\n"
        "from isobatch.trainers.ranks.world import World\n"
        "join = World.join\n"
        "def meet(*args):\n"
        "    if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '1'):\n"
        f"        {code}\n"
        "    return join(*args)\n"
        "World.join = meet\n"
    )
    run = launch_after(folder, meets, "task.args.fault=SIGKILL", "cluster.max_restarts=3")
    assert run.end() == (2 if state == "refused" else 1)
    assert (len(run.events("start")), len(run.events("restart"))) == (1, 1)
    assert run.messages[-1] == f"isobatch: {run.outcome['cause']}"
    assert (run.outcome["state"], run.outcome["step"], run.outcome["restarts"]) == (state, 2, 1)
    assert [event["cause"] for event in run.events(state)] == [run.outcome["cause"]]


def test_a_killed_data_loader_is_named_as_the_cause(folder: Path) -> None:
    fault = ["task.args.fault='loses its loader'", "task.args.always=false", "data.workers=1"]
    run = launch(folder, *fault, *RESTARTED)
    assert run.end() == 0, run.err
    (restart,) = run.events("restart")
    assert re.match(r"DataLoader worker \(pid \d+\) is killed by signal: Killed", restart["cause"])


def test_the_per_gpu_batch_is_halved_when_memory_runs_out(folder: Path) -> None:
    run = launch(folder, "task.args.fault='runs out of memory'", "task.args.fits=16", "checkpoint.every=1st")
    assert run.end() == 0, run.err
    (restart,) = run.events("restart")
    assert (restart["kind"], restart["per_gpu_before"], restart["per_gpu"]) == ("oom", 32, 16)
    assert (restart["rank"], restart["step"]) == (1, 2)
    assert re.search(r"can't allocate memory.* in loss\)$", restart["cause"])
    assert "restarting the workers with batch.per_gpu=16" in run.messages[0]
    plan = json.loads((run.dir / "plan.json").read_text())
    assert (plan["global_size"], plan["per_gpu"], plan["accumulation"]) == (64, 16, 2)
    assert run.events("going_on")[0]["step"] in (1, 2)
    assert run.outcome["state"] == "finished"


def test_a_run_ends_where_one_sample_does_not_fit_in_memory(folder: Path) -> None:
    run = launch(folder, "task.args.fault='runs out of memory'", "batch.per_gpu=1", "cluster.max_restarts=3")
    assert run.end() == 1
    assert run.outcome["state"] == "oom"
    assert len(run.messages) == 1
    assert run.messages[0].startswith("isobatch: rank 1 ran out of memory with 1 sample in a pass: RuntimeError")


# ---- signals


@pytest.mark.parametrize("after_s", [0.15, 0.6, 1.5])
def test_a_signal_at_the_start_stops_the_run_at_its_first_step(folder: Path, after_s: float) -> None:
    """The signal arrives while the config is composed, torch is imported, or the ranks connect."""
    run = launch_cold(folder, *LONG)
    time.sleep(after_s)
    run.process.terminate()
    assert run.end() == 75, run.err
    assert run.outcome["state"] == "stopped"
    assert run.outcome["cause"] == "SIGTERM"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_signal_to_the_launcher_stops_at_a_step(folder: Path, name: str) -> None:
    run = launch(folder, *LONG)
    run.await_training()
    if name == "SIGINT":
        os.killpg(run.process.pid, signal.SIGINT)  # like a terminal
    else:
        run.process.send_signal(signal.Signals[name])
        run.process.send_signal(signal.Signals[name])  # a second signal changes nothing
    assert run.end() == 75, run.err
    end = run.outcome
    assert (end["state"], end["cause"]) == ("stopped", name)
    assert end["samples"] == 64 * end["step"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_worker_stops_all(folder: Path, rank: int) -> None:
    run = launch(folder, "task.args.fault=SIGUSR2", f"task.args.rank={rank}", *LONG)
    assert run.end() == 75, run.err
    assert (run.outcome["state"], run.outcome["cause"], run.outcome["step"]) == ("stopped", "SIGUSR2", 3)


def test_a_second_interrupt_ends_at_once(folder: Path) -> None:
    run = launch(folder, "task.args.sleep=30")
    wait_until(lambda: run.events("start"))
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(timeout=15) == 130  # the step takes 30 s
    wait_until(lambda: not processes_of(run.dir), within_s=15)
    run.end()


def test_a_killed_launcher_leaves_no_orphans_and_the_same_command_resumes(folder: Path) -> None:
    run = launch(folder, *LONG, "checkpoint.every=1st")  # saves all the time
    run.await_training()
    wait_until(lambda: list(run.dir.glob("checkpoints/step-*")))
    pids = processes_of(run.dir)
    assert len(pids) == 3
    assert len({os.getsid(pid) for pid in pids}) == 3  # Ctrl-C reaches only the launcher
    run.process.kill()
    wait_until(lambda: not processes_of(run.dir), within_s=15)
    assert run.end() == -signal.SIGKILL
    assert run.outcome["state"] == "running"
    same = launch(folder, *LONG, "checkpoint.every=1st")
    wait_until(lambda: same.events("going_on"))
    same.process.terminate()
    assert same.end() == 75, same.err
    assert [event["found"] for event in same.events("crashed")] == [True]
    assert same.outcome["step"] > same.events("going_on")[0]["step"] >= 1
    assert not list(run.dir.glob("checkpoints/.*"))


def test_a_signal_before_anything_else_is_imported(folder: Path) -> None:
    """It comes while the launcher looks whether its packages are installed."""
    run = launch_after(
        folder,
        "import importlib.util, os, signal\n"
        "find = importlib.util.find_spec\n"
        "def find_spec(name, package=None):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return find(name, package)\n"
        "importlib.util.find_spec = find_spec\n",
    )
    assert run.end() == 75, run.err
    assert run.outcome["cause"] == "SIGTERM"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGKILL", -signal.SIGKILL)])
def test_counting_the_data_ends_with_the_launcher(folder: Path, name: str, code: int) -> None:
    """A separate process counts the data before the plan. Here the data never opens."""
    run = launch(folder, "batch.global_size=all", "task.args.fault='never opens'", "task.args.rank=0")
    wait_until(lambda: len(processes_of(run.dir)) == 2)
    run.process.send_signal(signal.Signals[name])
    wait_until(lambda: not processes_of(run.dir), within_s=15)
    assert run.end() == code
    assert run.messages == ["isobatch: SIGTERM, before anything was started"] * (code == 75)
    assert not run.dir.exists()


# ---- several machines


def test_two_machines_train_one_run(folder: Path) -> None:
    runs = two_machines(folder)
    assert [run.end() for run in runs] == [0, 0]
    assert runs[0].outcome["state"] == "finished"
    assert len(runs[0].events("start")) == 1
    assert "task of rank 1" in runs[0].log(1)


@pytest.mark.parametrize(
    ("fault", "rank", "cause"),
    [
        ("raises", 1, r"ValueError: boom \(faulty\.py:\d+ in loss\)"),
        ("fails at the end", 0, "ZeroDivisionError: .*"),  # after the other machine's workers have ended
    ],
)
def test_two_machines_restart_together(folder: Path, fault: str, rank: int, cause: str) -> None:
    faults = [f"task.args.fault='{fault}'", f"task.args.rank={rank}", "task.args.always=false"]
    runs = two_machines(folder, *faults, "cluster.max_restarts=1")
    assert [run.end() for run in runs] == [0, 0], [run.err for run in runs]
    assert runs[0].outcome["restarts"] == 1
    (restart,) = runs[0].events("restart")
    assert re.fullmatch(cause, restart["cause"])


def test_two_machines_crash_with_one_cause(folder: Path) -> None:
    runs = two_machines(folder, "task.args.fault=SIGKILL")
    assert [run.end() for run in runs] == [1, 1]
    for run in runs:
        assert "rank 1 crashed: killed by SIGKILL" in run.messages[0]
    assert "rank 1 crashed: killed by SIGKILL" in runs[0].outcome["cause"]


def test_two_machines_stop_together(folder: Path) -> None:
    runs = two_machines(folder, *LONG)
    runs[0].await_training()
    began = time.monotonic()
    runs[1].process.terminate()
    assert [run.end() for run in runs] == [75, 75]
    assert time.monotonic() - began < 5
    assert runs[0].outcome["state"] == "stopped"


def test_a_lost_machine_ends_the_other(folder: Path) -> None:
    runs = two_machines(folder, *LONG)
    runs[0].await_training()
    runs[1].process.kill()
    assert runs[0].end() == 1
    assert len(runs[0].messages) == 1
    assert runs[1].end() == -signal.SIGKILL


def test_machines_of_different_runs_do_not_connect(folder: Path) -> None:
    """Start one machine of each of two runs at the same address."""
    meeting = ["cluster.nodes=2", f"cluster.rendezvous=127.0.0.1:{free_port()}", "cluster.timeout_s=5"]
    runs = [launch(folder, *meeting, f"seed={seed}", ranks=1) for seed in (0, 1)]
    assert [run.end() for run in runs] == [1, 1]
    assert all("didn't meet" in run.messages[0] for run in runs)
    assert not runs[0].dir.exists()


def test_waiting_for_a_machine_can_be_stopped(folder: Path) -> None:
    port = free_port()
    run = launch(folder, "cluster.nodes=2", f"cluster.rendezvous=127.0.0.1:{port}", ranks=1)
    wait_until(lambda: listens(port))
    run.process.terminate()
    began = time.monotonic()
    assert run.end() == 75
    assert time.monotonic() - began < 20  # cluster.timeout_s is 600


# ---- torchrun


def test_a_stop_under_torchrun_exits_with_0(folder: Path) -> None:
    run = torchrun(folder, "task.args.fault=SIGTERM", *LONG)
    assert run.end() == 0, run.err
    assert (run.outcome["state"], run.outcome["step"]) == ("stopped", 3)


@pytest.mark.parametrize(
    ("fault", "rank", "cause", "last"),
    [
        ("refuses", 1, "not with me", "isobatch: not with me"),
        ("SIGKILL", 0, "no word from rank 0", "Signal 9"),
    ],
)
def test_torchrun_prints_the_first_error_once(folder: Path, fault: str, rank: int, cause: str, last: str) -> None:
    run = torchrun(folder, f"task.args.fault={fault}", f"task.args.rank={rank}")
    assert run.end() == 1
    assert len(run.messages) == 1
    assert cause in run.messages[0]
    assert last in run.err.splitlines()[-2]  # torchrun's own report comes after ours
    assert "message format" not in run.err  # our error file is one that it can read
    assert run.outcome["state"] == ("refused" if fault == "refuses" else "crashed")
    assert run.outcome["cause"].startswith(cause)


@pytest.mark.parametrize(("fault", "starts"), [("not finite", 1), ("raises", 2)])
def test_workers_of_torchrun_that_get_no_further_fail_again(folder: Path, fault: str, starts: int) -> None:
    options = ("--standalone", f"--max-restarts={starts}")
    faults = [f"task.args.fault='{fault}'", "task.args.rank=0", "checkpoint.every=null"]
    run = torchrun(folder, *faults, options=options, workers=1)
    assert run.end() == 1
    assert len(run.events("start")) == starts
    assert run.outcome["state"] == "crashed"
    assert all("step 3 (" in line or "ValueError: boom" in line for line in run.messages)


@pytest.mark.parametrize(
    ("fault", "always", "machines", "workers"),
    [("hangs", False, 1, 2), ("runs out of memory", True, 1, 1), ("raises", False, 2, 1)],
)
def test_torchrun_restarts_workers(folder: Path, fault: str, always: bool, machines: int, workers: int) -> None:
    """Test one agent, and two agents whose restart counts differ."""
    last = machines * workers - 1
    faults = [f"task.args.fault='{fault}'", f"task.args.rank={last}", f"task.args.always={always}"]
    options = ["--max-restarts=1", "--standalone"]
    if machines == 2:
        at = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        options[1:] = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=x", at]
    more = ("task.args.fits=32", "cluster.timeout_s=5")
    runs = [torchrun(folder, *faults, *more, options=tuple(options), workers=workers) for _ in range(machines)]
    assert [run.end() for run in runs] == [0] * machines, [run.err for run in runs]
    assert runs[0].outcome["state"] == "finished"
    assert len(runs[0].events("start")) == 2
    (restart,) = runs[0].events("restart")
    assert restart["rank"] == last
    assert restart.get("per_gpu") == (32 if fault == "runs out of memory" else None)
