"""Read back what the packages of trackers stored, and compare it with metrics.jsonl."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

Steps = dict[int, dict[str, float]]  # step → its numbers by name
BLOCK = 1 << 15  # of W&B's file, which is a log as LevelDB's


def logged(run: Path) -> Steps:
    """Return the numbers in metrics.jsonl by step: those of an evaluation with those of its step."""
    found: Steps = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        found[line["step"]] = found.get(line["step"], {}) | numbers
    return found


def tensorboard(run: Path) -> Steps:
    """Return what TensorBoard's own loader finds, rounded to its float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((run / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {"plan", "config", "_hparams_/session_start_info"} <= set(events.Tags()["tensors"])
    return _once((event.step, tag, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))


def wandb(run: Path) -> Steps:
    """Return the history of the one offline run; rows without W&B's own numbers."""
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = [record.history.item for record in wandb_records(file) if record.WhichOneof("record_type") == "history"]
    values = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    return _once((row["_step"], key, value) for row in values for key, value in row.items() if key[0] != "_")


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file, as far as it is written."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):
            return
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def mlflow_run(store: str, run: Path) -> tuple[Any, Any]:
    """Return MLflow's client, and the one run that belongs to ``run``."""
    from mlflow import MlflowClient

    client, identifier = MlflowClient(store), json.loads((run / "trackers.json").read_text())["id"]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`isobatch.run` = '{identifier}'")
    return client, found


def mlflow(store: str, run: Path) -> Steps:
    """Return the metrics of the one run in MLflow's store."""
    client, found = mlflow_run(store, run)
    histories = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    return _once((metric.step, key, metric.value) for key, history in histories.items() for metric in history)


def trackio(project: str, run: Path) -> Steps:
    """Return the rows of the one run in Trackio's store (in this process's TRACKIO_DIR)."""
    import trackio as package
    from trackio.sqlite_storage import SQLiteStorage

    identifier = json.loads((run / "trackers.json").read_text())["id"]
    (found,) = [one for one in package.Api().runs(project) if one.config["isobatch_run"] == identifier]
    rows = SQLiteStorage.get_logs(project, found.name, max_points=None, run_id=found.id)
    return _once((row["step"], key, row[key]) for row in rows for key in row.keys() - {"step", "timestamp"})


def same(stored: Steps, run: Path) -> bool:
    """Return whether a tracker has exactly the steps and numbers of metrics.jsonl, in float32."""
    ours = logged(run)
    assert sorted(stored) == sorted(ours)
    for step, numbers in ours.items():
        assert sorted(stored[step]) == sorted(numbers), step
        for key, value in numbers.items():
            assert numpy.float32(stored[step][key]) == numpy.float32(value), (step, key)
    return True


def _once(found: Iterator[tuple[int, str, float]]) -> Steps:
    """Collect values by step. Fail if a name has two values at one step."""
    steps: Steps = {}
    for step, name, value in found:
        assert name not in steps.setdefault(step, {}), f"{name} has two values at step {step}"
        steps[step][name] = value
    return steps
