"""Run the benchmarks of a GPU, each part in a process of its own, and write benchmarks/gpu.md after each.

A part writes its rows after each round, so what it measured is kept if the limit stops it.

python -m benchmarks gpu                  # all parts, the most valuable first; each takes two minutes at most
python -m benchmarks gpu gpt2 trace       # only these
python -m benchmarks gpu --dry-run        # every part on the CPU with tiny sizes; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import import_module
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.turns import Bench
from benchmarks.tables import markdown
from isobatch.trainers.ranks.world import World

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "benchmarks/gpu.md"
HEAD = """# Measurements on a GPU

Written by `make bench-gpu`; see [README.md](README.md). Loops take turns in one process, on one GPU and one rank, and
the clock starts and stops when the device is done; start-up times whole commands instead. Times are medians, and
ratios are medians of the turns' ratios. *plain, no DDP* is the loop of [by_hand.py](gpu/by_hand.py) without DDP, and
the fair baseline here: on one rank, DDP is work that ours skips. *plain DDP* is the same with DDP. All data is in
memory, and loaded without workers unless the row names them. *peak GB*: allocated at most, without what the other
loops hold. A section says on what it was measured; nothing is claimed without one.
"""
ABSENT = "Not measured yet."
LIMIT_S = 120


class Part(NamedTuple):
    """A table: its title, the function that returns its rows, and its description."""

    title: str
    rows: str
    about: str


PARTS = {
    "gpt2": Part(
        "A GPT-2 of 124 million parameters",
        "step.gpt2",
        "bf16, compiled, flash attention, 1,024 tokens per sample, AdamW, clipping, no dropout. MFU: 6 N + 12 · "
        "layers · width · length operations per token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) by the "
        "datasheet's peak. *flash attention kernels*: per step, in a trace of ours. Target: ours at most 1.0 × "
        "*plain, no DDP*, the better of its two rows.",
    ),
    "host": Part(
        "Host time at small models",
        "host.host",
        "Eager models so small that a step takes as long as the host needs to launch it. Target: ours at most 1.0 × "
        "*plain, no DDP*.",
    ),
    "trace": Part(
        "What waits inside a step",
        "host.trace",
        "Calls per step (and their time) that can block the host, in four steps of our loop under torch's profiler. "
        "Expected: one cudaEventSynchronize, for the numbers of the step before. Copies from memory that isn't pinned "
        "may block, too. We make such asynchronous copies: a note per pass (`Riders.write`) and the keys of each "
        "dropout layer (`Stream.keys`), 10 per step here, and 26 in a GPT-2 of 12 blocks with dropout.",
    ),
    "resnet": Part(
        "A ResNet-50",
        "step.resnet",
        "bf16, compiled, channels_last, 224 × 224, SGD; images are bytes on the host. MFU: by torch's count of "
        "operations. Target: ours at most 1.0 × *plain, no DDP*, the better of its two rows.",
    ),
    "optimizers": Part(
        "Optimizers alone",
        "others.steps_alone",
        "Steps on the GPT-2's parameters. *peak GB*: the state and the step's temporary tensors, such as LAMB's copy "
        "of the weights. Targets: LAMB at most 1.5 × fused AdamW, LARS at most 1.5 × fused SGD. With torch's "
        "operations neither is expected to be met: LAMB moves about 56 bytes per parameter (a clone, the fused step, "
        "two norms, the update) against AdamW's 28, and LARS about 52 against SGD's 20, so by arithmetic they take at "
        "least 2 × and 2.6 ×. A fused kernel for each could meet them, with 40 and 28 bytes. All this is arithmetic "
        "until it is measured.",
    ),
    "dropout": Part(
        "The GPT-2 with dropout",
        "step.dropout",
        "The GPT-2 above with dropout 0.1. *ours* uses keyed dropout; the other rows use torch's. Target: at most 1.1 "
        "× *ours, torch's dropout*.",
    ),
    "features": Part(
        "Noise, checkpoints, workers",
        "step.features",
        "The GPT-2 above, two passes per step, with one feature at a time. The time of ours with a checkpoint ends "
        "before the write does, which goes on in the background, with checksums and fsync; `torch.save` is waited "
        "for, without them. Target: ours at most 1.02 × *ours* with noise.every=10st.",
    ),
    "start": Part("Start-up", "others.starts", "From start to exit: two steps of the MLP of [plain.py](plain.py)."),
    "peers": Part(
        "What people use instead",
        "others.frameworks",
        "Steps of that MLP in each framework, 32 samples, fp32, as its documentation begins and with its best "
        "features. Times are from the end of the first step to the end of the last.",
    ),
}
UNCOVERED = (
    "several GPUs, and with them NCCL, FSDP and ZeRO",
    "offload to the host's memory",
    "the time that compiling takes",
    "data that doesn't fit into memory",
    "fp16, and devices other than CUDA's",
)
"""What no part measures."""


def where() -> str:
    """Return the date, the device, and the versions beside those of constraints.txt."""
    found = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = found[1] if found else "none"
    same = torch.__version__.partition("+")[0] == pinned
    device = "the CPU"
    if torch.cuda.is_available():
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.split() if which(ask[0]) else []
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver {(driver or ['unknown'])[0]}"
    return (
        f"{date.today()} on {device}, {os.cpu_count()} cores, torch {torch.__version__}"
        f"{'' if same else f' (not the pinned {pinned})'}, Python {platform.python_version()}"
    )


def measure(name: str, dry: bool, result: Path) -> None:
    """Measure a part in this process, and write its rows after each round, or why it can't be measured, as JSON."""
    module, _, function = PARTS[name].rows.partition(".")
    began = time.perf_counter()
    try:
        bench = Bench(World.join("cpu" if dry else "cuda", LIMIT_S, None, []), dry, began)
        for rounds, rows in enumerate(getattr(import_module(f"benchmarks.gpu.{module}"), function)(bench), 1):
            took = f"{where()}, in {time.perf_counter() - began:.0f} s"
            write(result, {"rows": rows, "rounds": rounds, "where": took})
    except ImportError as error:
        write(result, {"skipped": f"{error}"})
    sys.stdout.flush()
    os._exit(0)  # gloo may hang in a normal exit


def write(result: Path, found: dict[str, Any]) -> None:
    """Replace the result at once, so that it is whole when the limit stops this process."""
    (new := result.with_suffix(".new")).write_text(json.dumps(found))
    new.replace(result)


def measured(name: str, dry: bool) -> dict[str, Any]:
    """Measure a part in another process, and return what ``measure`` wrote, and why it stopped early if it did."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = [sys.executable, "-m", "benchmarks", "gpu", name, f"--result={result}", *(["--dry-run"] if dry else [])]
        env = os.environ | ({"OMP_NUM_THREADS": "1"} if dry else {})  # quicker for tiny sizes
        stopped = ""
        try:
            done = subprocess.run(child, cwd=ROOT, env=env, timeout=LIMIT_S, capture_output=True, text=True)
            if done.returncode:
                stopped = f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
        except subprocess.TimeoutExpired:
            stopped = f"the limit of {LIMIT_S} s\nWhat it compiled is cached, so another try is faster."
        found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        return found | ({"stopped": stopped} if stopped else {})


def section(name: str, found: dict[str, Any], dry: bool) -> str:
    """Return the section of a part that was measured."""
    part, command = PARTS[name], f"Measured {found['where']}, by `python -m benchmarks gpu {name}`."
    dry_run = "**A dry run: these numbers mean nothing.** " if dry else ""
    if "stopped" in found:
        why, *_ = found["stopped"].splitlines()
        command += f" **Stopped by {why}, after {found['rounds']} rounds.**"
    return f"## {part.title}\n\n{part.about}\n\n{dry_run}{command}\n\n{markdown(found['rows'])}\n"


def page(kept: dict[str, str]) -> str:
    """Return the page, given the sections of the measured parts by title, with a list of what isn't measured."""
    sections = [kept.get(part.title) or f"## {part.title}\n\n{part.about}\n\n{ABSENT}\n" for part in PARTS.values()]
    missing = [*(part.title for part in PARTS.values() if part.title not in kept), *UNCOVERED]
    return "\n".join([HEAD, *sections, "## Not measured\n", *(f"- {what}" for what in missing), ""])


def kept_sections() -> dict[str, str]:
    """Return the sections of the page with measurements, by title."""
    found = {text.partition("\n")[0]: f"## {text.strip()}\n" for text in PAGE.read_text().split("\n## ")[1:]}
    return {title: text for title, text in found.items() if ABSENT not in text}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", usage="%(prog)s [--dry-run] [PART …]")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with tiny sizes, and write nothing")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # measure one part in this process
    args = parser.parse_args(arguments)
    if unknown := sorted({*args.parts} - {*PARTS}):
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.result:
        return measure(args.parts[0], args.dry_run, args.result)
    if not (args.dry_run or torch.cuda.is_available()):
        sys.exit(f"torch {torch.__version__} finds no CUDA device here; --dry-run runs every part on the CPU")
    ends = dict[str, str]()
    for name in args.parts or PARTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        found = measured(name, args.dry_run)
        ends[name] = next(end for end in ("stopped", "skipped", "rows") if end in found)
        if "rows" in found:
            text = section(name, found, args.dry_run)
            print(text, flush=True)
            if not args.dry_run:
                PAGE.write_text(page(kept_sections() | {PARTS[name].title: text}))
        if ends[name] != "rows":
            print(f"{name} {ends[name]}: {found[ends[name]]}\n", flush=True)
    for end in ("rows", "skipped", "stopped"):
        names = [name for name in ends if ends[name] == end]
        print(f"{'measured' if end == 'rows' else end}: {', '.join(names) or 'none'}")
    sys.exit("stopped" in ends.values())
