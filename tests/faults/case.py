"""Run the commands of a row of the fault table, check their outcomes, and check that nothing was lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from benchmarks.soak import processes_of
from isobatch.scaling.order import indices
from tests.faults.task import SAMPLES, Fault
from tests.support.lines import untimed
from tests.support.warm import Warm

ROOT = Path(__file__).parents[2]
GLOBAL, STEPS = 32, 47  # three epochs of 500 samples; the last step is whole
BASE = (
    "task=custom", "task._target_=tests.faults.task.Faulty", f"batch.global_size={GLOBAL}", "duration=3ep",
    "lr.peak=0.05", "evaluate.every=7st", "log.every=1st", "checkpoint.every=10st", "data.fingerprint=false",
    "check.contract=false",  # looking at samples would count as fetching them
)  # fmt: skip
LAUNCH = (sys.executable, "launch.py")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")  # torchrun
DEADLINE_S = 120.0
ROUNDING = 1e-6  # the largest max |Δ| / max |w| with SGD where sums are rounded differently
APART = "max \\|Δ\\| / max \\|w\\|"  # a column of the table
WARM = "ISOBATCH_TEST_WARM"  # in the environment of `make test`; `make faults` starts commands as users do
SLOWLY = {"DELAY_S": "0.03"}  # delay of each pass
AHEAD = 4 * GLOBAL  # samples that a start may have fetched beyond the step it reached


class Broken(AssertionError):
    """A row doesn't hold."""


def check(condition: Any, message: str) -> None:
    if not condition:
        raise Broken(message)


def wait_until(condition: Callable[[], Any], what: str, within_s: float = DEADLINE_S, poll_s: float = 0.01) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        check(time.monotonic() < deadline, f"waited {within_s:g} s for {what}")
        time.sleep(poll_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(words: list[str], env: dict[str, str], output: IO[Any]) -> subprocess.Popen[bytes] | Warm:
    """Start a command. With WARM in ``env``, launch.py starts from a process that has imported torch."""
    if WARM in env and words[:2] == list(LAUNCH):
        return Warm(words[2:], ROOT, env, output)
    return subprocess.Popen(
        words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


class Command:
    """A running command whose run directory is ``directory``."""

    def __init__(self, words: Iterable[str], directory: Path, env: dict[str, str]) -> None:
        self.directory, self.env = directory, env
        self.output = directory.parent / f"output-{time.monotonic_ns()}"
        with open(self.output, "w") as output:
            self.process = started(list(words), {**os.environ, **env}, output)

    @property
    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    def send(self, name: str) -> None:
        self.process.send_signal(signal.Signals[name])

    def pids(self) -> list[int]:
        """Return the process ids of the launcher and all its processes."""
        return [self.process.pid, *processes_of(self.directory)]

    def kill(self, pids: Iterable[int]) -> None:
        for pid in set(pids):
            os.kill(pid, signal.SIGKILL)

    def exit_code(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill(self.pids())
            self.process.wait()
            raise Broken(f"it hung: {self.printed}") from None


@dataclass
class Case:
    """One run and its commands.

    Attributes:
        engine: the overrides that choose it.
        exact: require equal bits; otherwise max |Δ| / max |w| may be up to ``rounding``.
        counted: check that no sample was lost or repeated.
        ends: state and exit code of each command that met a fault; ``causes``: the recorded causes.
        orphans: number of processes that commands left behind.
    """

    folder: Path
    engine: tuple[str, ...] = ()
    exact: bool = True
    rounding: float = ROUNDING
    counted: bool = True
    ends: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    orphans: int = 0
    _started: list[tuple[Path, int]] = field(default_factory=list)  # per command: record of fetches, starts before it

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = self.folder / "run"

    def copy_from(self, other: Case) -> None:
        """Copy the state of another case."""
        shutil.copytree(other.folder, self.folder, dirs_exist_ok=True, symlinks=True)
        self._started = [(self.folder / fetched.name, before) for fetched, before in other._started]

    # ---- commands

    def start(
        self,
        *overrides: str,
        faults: Iterable[Fault] = (),
        by: Iterable[str] = LAUNCH,
        base: Iterable[str] = BASE,
        **env: str,
    ) -> Command:
        """Start a command of this run, by default with two ranks and no faults. ``base`` includes the engine."""
        fetched = self.folder / f"fetched-{len(self._started)}"
        fetched.mkdir()
        self._started.append((fetched, len(self.events("start"))))
        env |= {"FAULTS": json.dumps(list(faults)), "FETCHED": str(fetched), "OMP_NUM_THREADS": "1"}
        words, engine = list(by), self.engine if base else ()
        if "launch.py" not in words:
            words.append("launch.py")
        elif not any(text.startswith("cluster.gpus_per_node=") for text in overrides):
            overrides = ("cluster.gpus_per_node=2", *overrides)
        return Command([*words, *base, *engine, f"run.dir={self.run}", "device=cpu", *overrides], self.run, env)

    def expect_end(self, command: Command, state: str | None, code: int, cause: str = "") -> Command:
        """Wait for the end of a command, and check its exit code and outcome.

        Args:
            state: the state in ``outcome.json``, or None if this command can't have written it.
            cause: a pattern of the cause in ``outcome.json``.
        """
        found = command.exit_code()
        check(found == code, f"exit code {found}, not {code}: {command.printed[-2000:]}")
        outcome = self.outcome
        if state:
            check(outcome["state"] == state, f"{outcome}, not {state}")
            check(re.search(cause, outcome["cause"]), f"cause {outcome['cause']!r}, not {cause!r}")
            if state != "finished":
                self.causes.append(outcome["cause"])
        if state != "finished":
            self.ends.append(f"{state or outcome['state']}, {code}")
        deadline = time.monotonic() + 1
        while (left := processes_of(self.run)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.orphans += len(left)
        return command

    def expect_stop(self, command: Command, cause: str, code: int = 75) -> Command:
        return self.expect_end(command, "stopped", code, f"^{cause}$")

    def expect_crash(self, command: Command, cause: str, code: int = 1) -> Command:
        return self.expect_end(command, "crashed", code, cause)

    def expect_recovery(self, command: Command) -> Command:
        """Check that a command recovered by itself and finished the run."""
        self.expect_end(command, "finished", 0)
        self.ends.append("finished, 0")
        return command

    def run_to_end(self, *overrides: str, **more: Any) -> Command:
        """Run a command without faults to the end of the run."""
        return self.expect_end(self.start(*overrides, **more), "finished", 0)

    def resume_elsewhere(self, *overrides: str, **more: Any) -> Command:
        """Resume from the run directory alone, on other hardware, to the end of the run."""
        self.exact = False
        return self.run_to_end(*overrides, base=(), **more)

    def expect_found_dead(self) -> None:
        """Check that the next start recorded the previous attempt as dead, since that couldn't record its own end."""
        (event,) = self.events("crashed")[-1:] or [{}]
        check(
            event.get("found"), f"no event records that the previous attempt was found dead; the last crash is {event}"
        )
        self.causes.append(event["cause"])

    # ---- files of the run directory

    @property
    def outcome(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "outcome.json").read_text())
        return found

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [event for event in _lines(self.run / "events.jsonl") if name in (None, event["event"])]

    def event(self, name: str, **expected: Any) -> dict[str, Any]:
        """Return the only event of this name, after checking its fields against patterns and values."""
        (found, *more) = self.events(name) or [{}]
        check(found and not more, f"{len(self.events(name))} events {name}, not 1")
        for key, value in expected.items():
            same = re.search(value, found[key]) if isinstance(value, str) else value == found[key]
            check(same, f"{name}: {key} is {found[key]!r}, not {value!r}")
        return found

    def await_start(self, number: int) -> None:
        """Wait until all workers have started for the ``number``-th time."""
        wait_until(lambda: len(self.events("start")) >= number, f"start {number}")

    def await_step(self, step: int) -> None:
        wait_until(lambda: step == 0 or ((lines := self.metrics()) and lines[-1]["step"] >= step), f"step {step}")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines without measured times. A line that is being written is left out."""
        found = _lines(self.run / "metrics.jsonl")
        return untimed(found)

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    def saving(self) -> bool:
        """Return True while a checkpoint is being written."""
        return any((self.run / "checkpoints").glob(".step-*.tmp/*"))

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the model and, if the run has one, of their average."""
        files = sorted((self.run / "final").iterdir())
        return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}

    def state(self) -> dict[str, bytes]:
        """Return the tensor files of the last checkpoint."""
        return {file.name: file.read_bytes() for file in self.checkpoints()[-1].glob("*.safetensors")}

    # ---- nothing lost

    def count_samples(self) -> tuple[int, int, int]:
        """Return the numbers of lost, repeated and recomputed samples.

        Lost: the start that should have trained on it didn't. Repeated: two starts trained on it and kept the result.
        Recomputed: trained on again, since the first result was never saved.
        """
        lost = repeated = recomputed = 0
        starts = self._starts()
        ends = [begin for begin, _ in starts[1:]] + [STEPS * GLOBAL]
        check(all(a <= b for (a, _), b in zip(starts, ends, strict=True)), f"starts at {starts}")
        for (begin, fetched), end in zip(starts, ends, strict=True):
            due, rows = Counter(order(begin, end)), Counter(fetched)
            lost += (due - rows).total()
            beyond = rows - due
            ahead = Counter(order(end, max(end, begin + len(fetched)) + AHEAD))
            repeated += (beyond - ahead).total()
            recomputed += (beyond & ahead).total()
        return lost, repeated, recomputed

    def _starts(self) -> list[tuple[int, list[int]]]:
        """Return the first position and the fetched rows of every start of the workers that trained."""
        found: list[tuple[int, list[int]]] = []
        for event in self.events():
            if event["event"] == "start":
                first = len(found) - event["restart"]  # first start of its command; a refused command has none
                found.append((0, [int(row) for file in self._files(event, first) for row in file.read_text().split()]))
            elif event["event"] == "going_on":
                found[-1] = event["samples"], found[-1][1]
        return [start for start in found if start[1]]

    def _files(self, event: dict[str, Any], first: int) -> list[Path]:
        """Return the files of a start's fetched samples. ``first`` is the number of starts before its command."""
        folders = [folder for folder, before in self._started if before == first]
        return [file for folder in folders for file in folder.glob(f"{event['restart']}-*")]

    def distance(self, reference: Case) -> float:
        """Return max |Δ| / max |w| over all weights."""
        ours, theirs = self.weights(), reference.weights()
        check(ours.keys() == theirs.keys(), f"the weights have other names: {list(ours)}")
        largest = max(float(tensor.abs().max()) for tensor in theirs.values())
        return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest

    def compare(self, reference: Case) -> dict[str, str]:
        """Compare this run with an uninterrupted one, and return the table's cells.

        Raises:
            Broken: the runs differ.
        """
        distance = self.distance(reference)
        same = all(torch.equal(tensor, reference.weights()[name]) for name, tensor in self.weights().items())
        check(same if self.exact else distance <= self.rounding, f"max |Δ| / max |w| is {distance:.3g}")
        check(not self.exact or self.state() == reference.state(), "the last checkpoint has different tensors")
        ours, theirs = self.metrics(), reference.metrics()
        if not self.exact:
            ours, theirs = [[(line["step"], len(line)) for line in lines] for lines in (ours, theirs)]  # type: ignore[misc]
        other = [line for line in ours if line not in theirs][:3]
        check(ours == theirs, f"metrics.jsonl has {len(ours)} lines, not the same {len(theirs)}: {other}")
        lost, repeated, recomputed = self.count_samples() if self.counted else (0, 0, 0)
        check(not lost and not repeated, f"{lost} samples lost, {repeated} repeated")
        check(not self.orphans, f"{self.orphans} orphans")
        return {
            APART: "0 (bitwise)" if same else f"{distance:.1e}",
            "lost": str(lost) if self.counted else "",
            "repeated": str(repeated) if self.counted else "",
            "recomputed": str(recomputed) if self.counted else "",
            "orphans": str(self.orphans),
        }

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def _order() -> list[int]:
    rows: list[int] = indices(0, SAMPLES, 0, STEPS * GLOBAL + 10 * AHEAD).tolist()
    return rows


def order(start: int, stop: int) -> list[int]:
    """Return the dataset's rows at positions [start, stop) of the run, whose seed is 0."""
    return _order()[start:stop]


def _lines(file: Path) -> list[dict[str, Any]]:
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
