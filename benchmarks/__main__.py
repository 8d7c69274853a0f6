"""`make bench`: every measurement in one run, printed and kept in benchmarks/README.md.

python -m benchmarks rules large    # only these
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from benchmarks import (
    bitwise,
    checkpoints,
    critical,
    engines,
    far,
    invariance,
    large,
    noise,
    optimizers,
    rules,
    same,
    sample_order,
    start,
    step,
)
from benchmarks.peers import compare
from benchmarks.tables import Rows, markdown

PAGE = Path(__file__).parent / "README.md"
MARK = "<!-- everything below is written by `make bench` -->"


class Part(NamedTuple):
    """A table: its title, what makes its rows, and what they mean."""

    title: str
    rows: Callable[[], Rows]
    about: str


PARTS = {
    "step": Part(
        "A training step",
        step.rows,
        "784-128-10 MLP, 32 samples per process, SGD with Nesterov momentum, clipping, a schedule; against the "
        "loop of [plain.py](plain.py) in the same processes, turn by turn. At most 1.0 is the aim.",
    ),
    "engines": Part(
        "A training step, by engine",
        engines.rows,
        "The same work as above, on each engine against that engine by hand, as its own documentation has it "
        "([by_hand.py](by_hand.py)), in the same processes, turn by turn; *MLP* is the one above, *blocks* has four "
        "residual blocks of 0.5 million parameters; each with one parameter group, as by hand (where biases decay "
        "otherwise, ZeRO sends one message more). At most 1.05 is the aim.",
    ),
    "bitwise": Part(
        "A training step with numerics=bitwise",
        bitwise.rows,
        "Against one with numerics=fast, of as many micro-batches, in the same processes, turn by turn.",
    ),
    "start": Part(
        "Whole commands",
        start.rows,
        "From start to exit. Two ranks and two steps against `torchrun` with [plain.py](plain.py) (at most 0.75 "
        "is the aim), and with an engine against [by_hand.py](by_hand.py); a plan against the imports that it can't do "
        "without (at most 2). The last column counts runs that failed, ours / the other's, and weren't timed.",
    ),
    "sample_order": Part("The sample order", sample_order.rows, "One core."),
    "optimizers": Part(
        "A step of the optimizer",
        optimizers.rows,
        "The tensors of a small BERT (12 layers, hidden 256, 17.4 million numbers), one thread, turn by turn: "
        "medians, and medians of the turns' ratios. The kernel is built in C on first use; without a compiler "
        "torch's own operations do the work. For LAMB at most 2 × fused AdamW is the aim, and 2.5 × faster than "
        "the fastest of the others.",
    ),
    "noise": Part(
        "Measuring the gradient noise",
        noise.rows,
        "A step in which it is measured against one in which it isn't, turn by turn: what it takes is one more read "
        "of the gradient in each pass. `noise.every` says how many steps are measured: with 10st all of them "
        "together take a tenth of that longer, and at most 1.02 is the aim.",
    ),
    "checkpoints": Part(
        "Saving and going on",
        checkpoints.rows,
        "Weights in layers of 1 MiB with AdamW's state, so three times as much; in the same processes, turn by "
        "turn with what plain torch does. *copy*: what the training waits for; the first one goes to fresh "
        "memory. Against a mere copy of as many bytes, and against `torch.save` of the whole by rank 0 (neither "
        "checksums nor fsync), for which all wait. *write*: what follows in the background, with both. *taken in "
        "all*: how much longer that many steps take with a save than without, where the training has all cores at "
        "work already. *resume*: reading and checking included.",
    ),
    "saving": Part(
        "Saving and going on, by engine",
        checkpoints.engine_rows,
        "The same weights and optimizer, so that all engines save as many bytes; ranks hold and write parts of them, "
        "or, where each has all, as much each. Of each time that of the slowest rank.",
    ),
    "far": Part(
        "Going on in the middle of an epoch",
        far.rows,
        "10^9 samples, from a checkpoint in the middle, against a run from the beginning. Nothing is skipped by "
        "going through it: 1 is the aim.",
    ),
    "invariance": Part(
        "One global batch, cut in six ways",
        invariance.rows,
        "A small model with dropout and unequal numbers of units, SGD, 20 steps, global batch 96: Δ = max |Δ| / "
        "max |w| over all weights, against the first. 1e-6 is the aim.",
    ),
    "same": Part(
        "The same, by engine and feature",
        same.rows,
        "The cases of [tests/support/same.py](../tests/support/same.py): a small model with a shared and a frozen "
        "parameter, SGD unless the row says otherwise, 12 steps, global batch 41, at most 7 samples in a "
        "micro-batch. max |Δ| / max |w| over all weights against `ddp` on one rank, on 3 ranks.",
    ),
    "peers": Part(
        "What people use instead",
        compare.rows,
        "The same work by each, used as its documentation says, and in a second row its best opt-in way. *Steps*: "
        "the MLP of [plain.py](plain.py), 32 samples per process, SGD with Nesterov momentum, clipping, a schedule; "
        "in the same processes, turn by turn. Nothing is logged or saved; progress bars are on where they come so, "
        "and off in the second row. *Start to exit*: by `torchrun`, `accelerate launch --multi_gpu` (which is "
        "`torchrun` within) and `launch.py`. In brackets: the ratio to plain.py. *Δ*: a task whose samples have 1 "
        "to 7 tokens, without dropout, 20 steps of 96 samples (two epochs), cut as world × per-GPU × accumulation: "
        "max |Δ| / max |w| of the final weights against its own run on 1 × 96 × 1; *can't*: its batch is always the "
        "product of the three. *Lost / repeated*: samples of an epoch of 960 that were never trained on, and "
        "trainings beyond a sample's first, where the run is stopped in mid-epoch, with a checkpoint, on 2 × 16 × "
        "3, and goes on on 3 ranks (of what it does then, Lightning warns). To keep the global batch, the others "
        "are told 3 × 16 × 2; ours finds that itself.",
    ),
    "rules": Part(
        "Rules, by the betas",
        rules.rows,
        "A small GPT on bytes (`task=text`, 32 tokens a sample, 6,000 samples, no weight decay), AdamW, its LR "
        "tuned at a batch of 4 for each pair of betas; then at larger batches, with the same number of samples, "
        "by each rule. Validation loss in nats, mean ± standard deviation over 3 seeds.",
    ),
    "critical": Part(
        "Steps to a target, by batch",
        critical.rows,
        "`task=mnist1d`, SGD with momentum, a constant LR after 5 % of warmup, the best of three at each batch: "
        f"steps until the validation loss is {critical.TARGET}, means over 2 seeds. Linear scaling holds while the "
        "best LR is that of the linear rule and the speed-up is perfect (1). The noise scale was measured in the "
        "same runs, at the step at which the target was reached.",
    ),
    "large": Part(
        "A large batch, without and with a rule",
        large.rows,
        "`task=images` (width 8, ghosts of 32), 15 epochs, base LR tuned at 32: validation accuracy, mean ± "
        "standard deviation over 3 seeds, and how much of the gap to a batch of 64 a rule and a warmup close. "
        "Times are of a run on one core, all else included.",
    ),
}


def machine() -> str:
    """What it was measured on."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, hydra-core {version('hydra-core')}, "
        f"pydantic {version('pydantic')}, gloo on loopback"
    )


def main(names: Sequence[str]) -> None:
    head, _, measured = PAGE.read_text().partition(MARK)
    kept = {section.partition("\n")[0]: f"## {section.strip()}\n" for section in measured.split("\n## ")[1:]}
    for name in names or PARTS:
        title, rows, about = PARTS[name]
        print(f"{title} …", flush=True)
        began = time.perf_counter()
        table = markdown(rows())
        took = f"Measured in {time.perf_counter() - began:.0f} s by `python -m benchmarks {name}`."
        kept[title] = f"## {title}\n\n{about} {took}\n\n{table}\n"
        print(kept[title], flush=True)
    sections = [kept[part.title] for part in PARTS.values() if part.title in kept]
    PAGE.write_text(f"{head}{MARK}\n\nMeasured on {machine()}.\n\n" + "\n".join(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
