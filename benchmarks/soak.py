"""Start and end two workers many times, and count hangs, wrong exit codes and leftover processes.

    python -m benchmarks.soak --starts 100

Every fourth run is stopped by SIGTERM at a random moment, from before the workers exist to the middle of training.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from isobatch.conf.rundir.directory import RunDir

LAUNCH = Path(__file__).parents[1] / "launch.py"
WAYS = {
    "python launch.py": ([sys.executable, str(LAUNCH), "cluster.gpus_per_node=2"], {"finished": 0, "stopped": 75}),
    # torchrun exits with 1 after a signal, even if its workers stopped cleanly
    "torchrun launch.py": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(LAUNCH)],
        {"finished": 0, "stopped": 1},
    ),
}


@dataclass
class Tally:
    """The counted outcomes of one way to start."""

    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    wrong: list[str] = field(default_factory=list)
    leftovers: int = 0

    @property
    def clean(self) -> bool:
        return not (self.hangs or self.wrong or self.leftovers)


def soak(way: str, starts: int, deadline_s: float) -> Tally:
    """Start and end two workers ``starts`` times in one of ``WAYS``."""
    tally = Tally()
    for number in range(starts):
        with tempfile.TemporaryDirectory(prefix="isobatch-soak-") as folder:
            _one(way, Path(folder) / "run", stopped=number % 4 == 3, deadline_s=deadline_s, tally=tally)
    return tally


def _one(way: str, run: Path, *, stopped: bool, deadline_s: float, tally: Tally) -> None:
    command, codes = WAYS[way]
    length = "100000st" if stopped else "2st"
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "task=digits", "device=cpu", f"duration={length}", f"run.dir={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        if stopped:
            _wait_for_random_moment(run, way)
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        tally.hangs += 1
        for pid in {process.pid, *processes_of(run)}:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        return
    if not stopped:
        tally.seconds.append(time.monotonic() - began)
    deadline = time.monotonic() + 1
    while (leftovers := processes_of(run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    tally.leftovers += len(leftovers)
    for pid in leftovers:
        os.kill(pid, signal.SIGKILL)
    outcome = RunDir(run).outcome()
    end, wanted = outcome.state if outcome else "no outcome", "stopped" if stopped else "finished"
    tally.ends[end] += 1
    if end != wanted or process.returncode != codes[wanted]:
        last = "\n".join(output.splitlines()[-10:])
        tally.wrong.append(f"{end} instead of {wanted}, exit code {process.returncode}:\n{last}")


def _wait_for_random_moment(run: Path, way: str) -> None:
    """Wait up to 3 s from the start, or from the first event of torchrun, which kills workers without handlers."""
    while way.startswith("torchrun") and not (run / "events.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.2 + 2.8 * random.random())


def processes_of(run: Path) -> list[int]:
    """Return the processes with this run directory in their command line, which forked workers inherit."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in file.read_bytes() and _state(file.parent) != "Z":
                found.append(int(file.parent.name))
        except OSError:
            pass
    return found


def _state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100, help="starts of each way (100)")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds after which a start counts as hung (60)")
    parser.add_argument("--way", choices=WAYS, action="append", help="only this way")
    arguments = parser.parse_args()
    print(f"{'two workers by':20} {'starts':>6} {'hangs':>6} {'wrong':>6} {'left':>6} {'median':>8}  ends", flush=True)
    clean = True
    for way in arguments.way or WAYS:
        tally = soak(way, arguments.starts, arguments.deadline)
        clean = clean and tally.clean
        ends = ", ".join(f"{count} {state}" for state, count in sorted(tally.ends.items()))
        seconds = f"{median(tally.seconds):6.2f} s" if tally.seconds else ""
        counts = f"{arguments.starts:6} {tally.hangs:6} {len(tally.wrong):6} {tally.leftovers:6}"
        print(f"{way:20} {counts} {seconds:>8}  {ends}", flush=True)
        for failure in tally.wrong:
            print(failure)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
