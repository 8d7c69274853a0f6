"""Cut the same global batch in six ways, and compare the weights after 20 steps.

python -m benchmarks.invariance
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CUTS = ((1, 96, 1), (1, 32, 3), (2, 16, 3), (3, 32, 1), (3, 7, 5), (4, 25, 1))  # world × per-GPU at most × accumulation


def train(world: int, per_gpu: int, directory: Path) -> dict[str, torch.Tensor]:
    """Train the dropout model with unequal unit counts by the command line, and return its final weights."""
    command = [
        sys.executable, str(ROOT / "launch.py"), f"run.dir='{directory}'", f"cluster.gpus_per_node={world}",
        "device=cpu", "task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=96",
        f"batch.per_gpu={per_gpu}", "duration=20st", "lr.peak=0.05", "evaluate.every=null",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return load_file(directory / "final" / "model.safetensors")


def rows() -> list[dict[str, Any]]:
    """Return max |Δ| / max |w| over all weights for each cut, against the first cut."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        weights = [train(world, per_gpu, Path(folder) / f"{world}x{per_gpu}") for world, per_gpu, _ in CUTS]
    largest = max(float(tensor.abs().max()) for tensor in weights[0].values())
    for (world, per_gpu, accumulation), other in zip(CUTS, weights, strict=True):
        delta = max(float((other[name] - tensor).abs().max()) for name, tensor in weights[0].items())
        found.append({"world × per-GPU × accumulation": f"{world} × {per_gpu} × {accumulation}", "Δ": delta / largest})
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
