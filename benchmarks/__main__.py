"""Run the benchmarks, print their tables and write them to benchmarks/results.md (``make bench``).

python -m benchmarks rules large    # only these
python -m benchmarks gpu            # on a GPU: see gpu/run.py
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
    branch,
    checkpoints,
    control,
    critical,
    engines,
    far,
    forecast,
    invariance,
    large,
    memory,
    noise,
    noise_scale,
    optimizers,
    report,
    rules,
    same,
    sample_order,
    start,
    step,
    sweeps,
    trackers,
    tune,
)
from benchmarks.gpu import run as gpu
from benchmarks.peers import compare
from benchmarks.tables import Rows, markdown

PAGE = Path(__file__).parent / "results.md"
HEAD = "# Measurements\n\nWritten by `make bench`; see [README.md](README.md)."


class Part(NamedTuple):
    """A table: its title, the function that measures its rows, and its description."""

    title: str
    rows: Callable[[], Rows]
    about: str


PARTS = {
    "step": Part(
        "A training step",
        step.rows,
        "784-128-10 MLP, 32 samples per process, SGD with Nesterov momentum, clipping, a schedule; against the "
        "loop of [plain.py](plain.py) in the same processes, taking turns. Target: at most 1.0.",
    ),
    "engines": Part(
        "A training step, by engine",
        engines.rows,
        "The same work as above, with each engine against that engine used by hand as in its documentation "
        "([by_hand.py](by_hand.py)), in the same processes, taking turns. *MLP* is the model above; *blocks* has four "
        "residual blocks of 0.5 million parameters. Both have one parameter group, as by hand: a second group for "
        "biases costs ZeRO one more message. Target: at most 1.05.",
    ),
    "bitwise": Part(
        "A training step with numerics=bitwise",
        bitwise.rows,
        "Against numerics=fast with as many micro-batches, in the same processes, taking turns.",
    ),
    "start": Part(
        "Whole commands",
        start.rows,
        "From start to exit. Two ranks and two steps against `torchrun` with [plain.py](plain.py) (target: at most "
        "0.75), and with an engine against [by_hand.py](by_hand.py); a plan against the imports that it needs "
        "(target: at most 2). The last column counts failed runs, ours / the other's, which weren't timed.",
    ),
    "sample_order": Part("The sample order", sample_order.rows, "One core."),
    "optimizers": Part(
        "A step of the optimizer",
        optimizers.rows,
        "The tensors of a small BERT (12 layers, hidden 256, 17.4 million numbers), one thread, taking turns: "
        "medians, and medians of the turns' ratios. The C kernel is compiled on first use; without a compiler, "
        "LAMB and LARS use torch's operations. Target for LAMB: at most 2 × fused AdamW, and 2.5 × faster than "
        "the fastest other LAMB.",
    ),
    "noise": Part(
        "Measuring the gradient noise",
        noise.rows,
        "A step that measures the noise against one that doesn't, taking turns. Micro-batches cost one more read of "
        "the gradient in each pass; halves (`noise.parts=2`) cost a copy, a comparison and one more all-reduce, and "
        "twice the passes where a step has one. The last column is what follows for `noise.every=10st`. Target: at "
        "most 1.02.",
    ),
    "noise_scale": Part(
        "The gradient noise scale, against the gradients of single samples",
        noise_scale.rows,
        f"Batch {noise_scale.BATCH}, {noise_scale.STEPS} steps, each of which is measured, 2 seeds; compared at "
        f"{len(noise_scale.POINTS)} steps of each run with the gradients of {noise_scale.SAMPLES} samples one by one "
        f"(torch.func), means over {len(noise_scale.AGES)} steps up to there. Halves are measured in the optimizer's "
        "norm and micro-batches in the raw norm, and so is the scale by sample. *known*: points at which the interval "
        "was bounded; the columns after it are of these. *measured / by sample*: geometric mean. *over cuts*: largest "
        "relative difference over 1 × 32 samples, 4 passes of 8, and 2 ranks.",
    ),
    "trackers": Part(
        "Sending lines to trackers",
        trackers.rows,
        "Steps of an MLP with 3.2 million parameters, whose lines go to a process per tracker, against the same steps "
        "without trackers, taking turns, once each tracker is open: medians, and medians of the turns' ratios. The "
        "last column is what the processes use in all, on a core that they share with the training at a low priority: "
        "most of it imports the packages, once per start. Target: at most 1.02 with log.every=10st.",
    ),
    "checkpoints": Part(
        "Saving and resuming",
        checkpoints.rows,
        "Weights in layers of 1 MiB with AdamW's state, so three times as many bytes; in the same processes, taking "
        "turns with plain torch. *copy*: the time that training waits; the first copy goes to newly allocated "
        "memory. It is compared with a plain copy of as many bytes, and with `torch.save` of everything by rank 0 "
        "(without checksums and fsync), for which all ranks wait. *write*: the write in the background, with checksums "
        "and fsync. *total cost*: how much longer the same steps take with a save than without, while training uses "
        "all cores. *resume*: includes reading and validation.",
    ),
    "saving": Part(
        "Saving and resuming, by engine",
        checkpoints.engine_rows,
        "The same weights and optimizer, so all engines save as many bytes. Each rank writes its shard, or an equal "
        "part of the state if every rank holds all of it. Times are those of the slowest rank.",
    ),
    "far": Part(
        "Resuming in the middle of an epoch",
        far.rows,
        "10^9 samples, resumed from a checkpoint in the middle, against a run from the start. Isobatch doesn't iterate "
        "over the samples before the checkpoint. Target: 1.",
    ),
    "invariance": Part(
        "One global batch, cut in six ways",
        invariance.rows,
        "A small model with dropout and unequal numbers of units, SGD, 20 steps, global batch 96: Δ = max |Δ| / "
        "max |w| over all weights, against the first cut. Target: at most 1e-6.",
    ),
    "same": Part(
        "The same run, by engine and feature",
        same.rows,
        "The cases of [tests/support/same.py](../tests/support/same.py): a small model with a shared and a frozen "
        "parameter, SGD unless the row says otherwise, 12 steps, global batch 41, at most 7 samples in a "
        "micro-batch. max |Δ| / max |w| over all weights against `ddp` on one rank, on 3 ranks.",
    ),
    "peers": Part(
        "What people use instead",
        compare.rows,
        "The same work in each framework, used as in its documentation, and in a second row with its best opt-in "
        "features. *Steps*: the MLP of [plain.py](plain.py), 32 samples per process, SGD with Nesterov momentum, "
        "clipping, a schedule; in the same processes, taking turns. Nothing is logged or saved; progress bars have "
        "their default in the first row and are off in the second. *Start to exit*: by `torchrun`, `accelerate launch "
        "--multi_gpu` (which calls `torchrun`) and `launch.py`. In brackets: the ratio to plain.py. *Δ*: a task whose "
        "samples have 1 to 7 tokens, without dropout, 20 steps of 96 samples (two epochs), cut as world × per-GPU × "
        "accumulation: max |Δ| / max |w| of the final weights against its own run on 1 × 96 × 1; *can't*: the batch is "
        "always the product of the three. *Lost / repeated*: the samples of an epoch of 960 that were never trained "
        "on, and the repeated uses of samples, if the run is stopped in mid-epoch with a checkpoint on 2 × 16 × 3 and "
        "resumed on 3 ranks (Lightning warns about the result). To keep the global batch, the other frameworks are "
        "set to 3 × 16 × 2; Isobatch derives that itself.",
    ),
    "report": Part(
        "Reports",
        report.rows,
        "100 runs with 10,000 logged steps each, from start to exit, with the tables, all plots and the page; the best "
        "of three.",
    ),
    "rules": Part(
        "Rules, by the betas",
        rules.rows,
        "A small GPT on bytes (`task=text`, 32 tokens per sample, 6,000 samples, no weight decay) with AdamW. The LR "
        "was tuned at a batch of 4 for each pair of betas, then scaled by each rule to larger batches, for the same "
        "number of samples. Validation loss in nats, mean ± standard deviation over 3 seeds.",
    ),
    "critical": Part(
        "Steps to a target, by batch",
        critical.rows,
        "`task=mnist1d`, SGD with momentum, a constant LR after 5 % of warmup, the best of three LRs at each batch: "
        f"steps until the validation loss is {critical.MNIST1D.target}, means over 2 seeds. Linear scaling holds while "
        "the best LR is that of the linear rule and the speed-up is perfect (1). The noise scale was measured in the "
        "same runs, at the step that reached the target.",
    ),
    "critical-text": Part(
        "Steps to a target, by batch, of a language model",
        critical.rows_of_text,
        "A small GPT on bytes (`task=text`, 32 tokens per sample, width 32), AdamW, a constant LR after a warmup of "
        "200 samples, the best of three LRs at each batch: steps until the validation loss is "
        f"{critical.TEXT.target} nats, 1 seed.",
    ),
    "forecast": Part(
        "Forecasts of what a target takes at other batches",
        forecast.rows,
        "The fit of data to a target by batch (`action=report`): results of MLPerf; the curves of the tables above; "
        "and curves of a noisy quadratic in closed form (50 dimensions, the best LR at each batch, to a share of the "
        "first loss), whose critical batch E_min/S_min is known. *Left out*: each point predicted from the others, at "
        "the ends by extrapolation. p is fitted from six batches on.",
    ),
    "branch": Part(
        "The critical batch by branches",
        branch.rows,
        "`task=mnist1d`, a constant LR, runs of 30,000 samples at 32, three of their checkpoints branched off "
        "(`action=tune tune.parts=[branch]`). Beside it the fit of the samples until the validation loss is "
        f"{branch.TARGET}, by batch from 16 to 512: AdamW with the √ rule that the branches use, too, means over "
        "2 seeds; SGD from the table of steps to a target, at the best LR of each batch. In brackets: 95 % intervals.",
    ),
    "branch-text": Part(
        "The critical batch by branches, of a language model",
        branch.rows_of_text,
        "The task and the target of *Steps to a target, by batch, of a language model*, and beside it the fit of that "
        f"table: runs of {branch.TEXT_SAMPLES:,} samples at 32, otherwise as above.",
    ),
    "control": Part(
        "Batches that move by measurement",
        control.rows,
        f"AdamW, clipping, the LR tuned at a batch of {control.START}, carried by the √ rule, constant after its "
        "warmup; until the validation loss of the averaged weights (`ema=2000sa`) is "
        + ", ".join(f"{one.target:g} (`{task}`)" for task, one in control.SETTINGS.items())
        + ", interpolated between evaluations. *Cost*: the sum over the steps of 1 + batch/"
        f"{control.HALF_SPEED}, as on hardware that reaches half of its speed at {control.HALF_SPEED}. `images` has a "
        f"convolutional net without BatchNorm. Controllers start at {control.START}, and know the {control.HALF_SPEED} "
        "where they need a speed. The curriculum is planned for as many samples as the controlled runs, doubling (in "
        "place of a cosine decay) for fewer, at whose end the LR has decayed. Means ± standard deviations over "
        f"{len(control.SEEDS)} seeds, none of which was used to choose settings. Ratios are of runs with the same "
        "seed, and their means are geometric, over the seeds and, in the last rows, over the tasks.",
    ),
    "control-decay": Part(
        "Batches that move while the LR decays",
        control.rows_of_decay,
        "The tasks and base LRs of the table above, without averaged weights: whole runs with a cosine decay, or with "
        "batches that double in its place. Aims: by doubling at most "
        f"{control.AIM_OF_DOUBLING:g} × the cost at 1 % more loss, and less than that together with a controller.",
    ),
    "large": Part(
        "A large batch, without and with a rule",
        large.rows,
        "`task=images` (width 8, ghosts of 32), 15 epochs, base LR tuned at 32: validation accuracy, mean ± "
        "standard deviation over 3 seeds, and how much of the gap to a batch of 64 a rule and a warmup close. "
        "Times are those of whole runs on one core.",
    ),
    "memory": Part(
        "The largest per-GPU batch that fits",
        memory.rows,
        "What the memory part of `action=tune` finds under five limits of a CPU's memory (`cluster.memory_gb`, of "
        "which 20 % stay free), against the largest size by trying sizes around it in steps of 2 % or 8 samples, "
        "each in a whole step. *MLP*: 1 million parameters and inputs of 16,384 numbers; *Conv*: four layers with "
        "BatchNorm for 3 × 32 × 32 images; *GPT*: two layers of width 128 for 128 tokens. The estimate is traced on "
        "fake tensors; its error is that of the whole process's peak at the size found. Targets: within 5 % in at "
        "most 5 probes, the estimate within 10 %.",
    ),
    "tune": Part(
        "The recommended batch",
        tune.rows,
        "What `action=tune` recommends at a global batch of 32, against the best batch of a sweep over "
        f"{', '.join(map(str, tune.BATCHES))} and the recommended ones: cost until the validation loss reaches a "
        "target, means over 2 seeds, AdamW with the LR by the square root of the batch, constant after its warmup. "
        "Target: at most 1.1. The last column is the time of the tuning over that of the sweep, which stops each run "
        "at the target and trains two runs at a time.",
    ),
    "tune-time": Part(
        "How long finding a batch takes",
        tune.durations,
        "Memory, speed and noise of a small MLP, and the recommendation. Target: less than a minute on two cores.",
    ),
    "sweeps": Part(
        "The classic comparison of batch sizes",
        sweeps.rows,
        "SGD, the LR tuned at 32 and either scaled by the linear rule or not, 20 % of warmup, two cores training one "
        "run each: `images` (width 8, ghosts of 8) for 5 epochs, `mnist1d` for 10, both of 4,000 samples. Means over "
        "3 seeds, without diverged runs. *Gradient variance*: tr Σ / batch of a step's gradient, smoothed, at the end. "
        "The reports that `action=report` made of these runs: [images](reports/images/report.md), "
        "[mnist1d](reports/mnist1d/report.md).",
    ),
}


def machine() -> str:
    """Return a description of the machine and the versions of the libraries."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, hydra-core {version('hydra-core')}, "
        f"pydantic {version('pydantic')}, gloo on loopback"
    )


def main(names: Sequence[str]) -> None:
    kept = {section.partition("\n")[0]: f"## {section.strip()}\n" for section in PAGE.read_text().split("\n## ")[1:]}
    for name in names or PARTS:
        title, rows, about = PARTS[name]
        print(f"{title} …", flush=True)
        began = time.perf_counter()
        table = markdown(rows())
        took = f"Measured in {time.perf_counter() - began:.0f} s by `python -m benchmarks {name}`."
        kept[title] = f"## {title}\n\n{about} {took}\n\n{table}\n"
        print(kept[title], flush=True)
    sections = [kept[part.title] for part in PARTS.values() if part.title in kept]
    PAGE.write_text(f"{HEAD}\n\nMeasured on {machine()}.\n\n" + "\n".join(sections))


if __name__ == "__main__":
    gpu.main(sys.argv[2:]) if sys.argv[1:2] == ["gpu"] else main(sys.argv[1:])
