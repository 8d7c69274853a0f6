"""Submit runs as jobs of the lab, disturb them, and compare them with undisturbed runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak import processes_of
from tests.cluster.lab import Lab, run
from tests.faults.case import BASE, ROOT, Case, check, wait_until
from tests.faults.table import REFERENCES, References
from tests.faults.task import Fault

ONE_THREAD = "cluster.environment.OMP_NUM_THREADS=1"  # so that sums are rounded the same on every node
WITHIN_S = 400.0  # a run that a slow machine starts four times
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
AT_ONCE = 2


def reference(*overrides: str) -> Callable[[Case], object]:
    return lambda case: case.run_to_end(ONE_THREAD, *overrides)


REFERENCES |= {f"{ranks} ranks": reference(f"cluster.gpus_per_node={ranks}") for ranks in (2, 4)}
REFERENCES |= {f"peak {peak}": reference(f"lr.peak={peak}") for peak in ("0.05", "0.04", "0.03")}


@dataclass(kw_only=True)
class JobCase(Case):
    """One run and its jobs.

    Attributes:
        lab: the Slurm cluster.
        nodes: the nodes reserved for this run.
        references: undisturbed runs.
    """

    lab: Lab
    nodes: tuple[str, ...]
    references: References

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.folder / "fetched").mkdir(exist_ok=True)

    # ---- commands

    def command(
        self, *overrides: str, faults: Iterable[Fault] = (), base: Iterable[str] = BASE, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that submits a job, by default on all of this case's nodes with one worker each."""
        given = {override.partition("=")[0] for override in overrides}
        usual = {
            "cluster": "slurm", "cluster.nodes": len(self.nodes), "cluster.gpus_per_node": 1, "cluster.gres": "none",
            "cluster.nodelist": quoted(",".join(self.nodes)), "run.dir": self.run, "device": "cpu",
        }  # fmt: skip
        words = [*base, ONE_THREAD, *(f"{key}={value}" for key, value in usual.items() if key not in given), *overrides]
        env |= {"FAULTS": json.dumps(list(faults)), "FETCHED": str(self.folder / "fetched")}
        return launch(*words, **env)

    def submit(self, *overrides: str, **more: Any) -> str:
        """Run a command that submits a job, and return the job's id."""
        done = self.command(*overrides, **more)
        check(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        found = re.search(r"^submitted job (\d+)", done.stdout, re.MULTILINE)
        check(found, f"the output names no job: {done.stdout}")
        assert found
        return found[1]

    def sbatch(self, script: str, *overrides: str, **env: str) -> str:
        """Submit a script of slurm/ by hand, and return the job's id."""
        env |= {"FAULTS": "[]", "FETCHED": str(self.folder / "fetched")}
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        options = (f"--nodelist={','.join(self.nodes)}", f"--output={self.folder}/slurm-%j.out")
        words = ("sbatch", "--parsable", *options, f"slurm/{script}", *BASE, ONE_THREAD, f"run.dir={self.run}")
        return run(*words, "device=cpu", *overrides, env={**os.environ, **env}, cwd=ROOT).strip()

    # ---- jobs

    def element(self, name: str) -> JobCase:
        """Return the case of one run of a sweep."""
        element = dataclasses.replace(self)
        element.run = self.run / name
        return element

    def await_end(self, job: str) -> str:
        """Wait for the end of a job, and return its state."""
        wait_until(lambda: has_ended(job), f"the end of job {job}", WITHIN_S, poll_s=0.1)
        return field(job, "JobState")

    def expect_finish(self, job: str) -> None:
        """Check that the job finishes the run and leaves no processes."""
        state = self.await_end(job)
        check((state, self.outcome["state"]) == ("COMPLETED", "finished"), f"{state}, {self.outcome}")
        wait_until(lambda: not processes_of(self.run), "remaining processes to end", 10)

    @property
    def diagnostics(self) -> str:
        """Return the output and the events of the jobs."""
        files = [*sorted(self.folder.rglob("slurm*.out")), self.run / "events.jsonl"]
        return "\n".join(f"{file}:\n{file.read_text(errors='replace')}" for file in files if file.exists())

    def expect_same(self, reference: str) -> None:
        """Check that the result equals the undisturbed run, without lost or repeated samples."""
        self.compare(self.references(reference))

    def _files(self, event: dict[str, Any], first: int) -> list[Path]:
        start = f"{event['job']}.{event['job_restart']}.{event['restart']}"
        return list((self.folder / "fetched").glob(f"{start}-*"))


def launch(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as on a login node."""
    return subprocess.run(
        [sys.executable, "launch.py", *words], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def quoted(text: str) -> str:
    """Quote a text for Hydra."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def show(job: str) -> str:
    """Return Slurm's description of a job or an array element."""
    return run("scontrol", "--oneliner", "show", "job", job)


def field(job: str, name: str) -> str:
    """Return a field of Slurm's description of a job."""
    found = re.search(rf"(?:^|\s){name}=(.*?)(?: \w+=|$)", show(job), re.DOTALL)
    return found[1].strip() if found else ""


def has_ended(job: str) -> bool:
    return field(job, "JobState") in ENDED


# ---- tests that run at the same time

Act = Callable[[JobCase], None]


class Cluster:
    """Run acts on the lab, at most ``AT_ONCE`` at a time, each on nodes of its own."""

    def __init__(self, lab: Lab, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.lab, self.folder = lab, folder
        self.references = References(folder / "references")
        self._pool = pool
        self._free, self._changed, self._next = list(lab.nodes), threading.Condition(), threading.Lock()
        self._done: dict[Act, Future[None]] = {}

    def start(self, acts: Iterable[tuple[Act, int]]) -> None:
        self._done = {act: self._pool.submit(self._do, act, nodes) for act, nodes in acts}

    def result(self, act: Act) -> None:
        """Wait for the end of ``act``, and raise its error."""
        self._done[act].result()

    def _do(self, act: Act, count: int) -> None:
        with self._reserved(count) as nodes:
            case = JobCase(folder=self.folder / act.__name__, lab=self.lab, nodes=nodes, references=self.references)
            try:
                act(case)
            except Exception as error:
                error.add_note(f"{self.lab.diagnostics}\n{case.diagnostics}")
                raise
            finally:
                self.lab.clear(nodes)

    @contextmanager
    def _reserved(self, count: int) -> Iterator[tuple[str, ...]]:
        with self._next, self._changed:  # first come, first served
            self._changed.wait_for(lambda: len(self._free) >= count)
            self._free.sort()
            nodes = [self._free.pop(0) for _ in range(count)]
        try:
            yield tuple(nodes)
        finally:
            with self._changed:
                self._free += nodes
                self._changed.notify_all()


def on_nodes(count: int) -> Callable[[Act], Callable[[Cluster], None]]:
    """Turn an act into a test. The first test starts all acts."""

    def made(act: Act) -> Callable[[Cluster], None]:
        def test(cluster: Cluster) -> None:
            cluster.result(act)

        test.__doc__ = act.__doc__
        test.act, test.nodes = act, count  # type: ignore[attr-defined]
        return test

    return made
