"""Test the Python API in a real notebook, whose cells run one after another in a kernel."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
CELLS = (
    """
import gc, os, signal, torch
def state():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    return handlers, gc.isenabled(), dict(os.environ)
before = state()
import isobatch
assert state() == before
""",
    """
class Task:
    def model(self):
        return torch.nn.Linear(2, 1)

    def train_data(self):
        inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def loss(self, model, batch):
        inputs, targets = batch
        return ((model(inputs) - targets) ** 2).mean(1)
""",
    """
result = isobatch.train(Task, "batch.global_size=16", "lr.peak=0.1", "duration=4st", "device=cpu", "data.workers=1")
assert state() == before
""",
    "longer = isobatch.train(Task, f'run.dir={result.directory}', 'duration=6st')",
    "task, model = isobatch.load(result.directory)\nlonger.state, longer.metrics['step'], model.training",
    """
isobatch.train(Task, "batch.global_size=32", "lr.peak=0.1", "duration=6st", "device=cpu")
report = isobatch.report("runs", "report.metric=loss")
assert state() == before
assert isobatch.history(result.directory)[-1]["step"] == report.runs[0].done.step == 6
assert (report.directory / "report.json").exists()
report
""",
)


def test_a_notebook_trains_its_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell's output shows the progress, and another cell extends the run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source=cell.strip()) for cell in CELLS])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.text for output in notebook.cells[2].outputs if output.output_type == "stream")
    assert "step 4/4" in printed
    assert "finished after 4 steps" in printed
    assert notebook.cells[4].outputs[0].data["text/plain"] == "('finished', 6, False)"
    table = notebook.cells[5].outputs[-1].data["text/plain"]
    assert "batch 16" in table
    assert "batch 32" in table
