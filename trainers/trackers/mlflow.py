"""MLflow, by default its local store: ``mlflow.db`` in the working directory, or where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import os
import re
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 take minutes, and the follower tries again itself

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.trackers import MLflow
from isobatch.trainers.trackers.tracker import Line, RunInfo, numbers

METRICS, PARAMS = 1000, 100  # MLflow's limits of a batch
VALUE = 500  # characters of a parameter, in the store that takes the fewest
TAG = "isobatch.run"  # by which a later start finds the run
STATUS = {"finished": "FINISHED", "stopped": "KILLED"}  # else it failed; "running" where training has just crashed


class Adapter:
    """Add to a run; what MLflow has stays there, so a step that it has isn't sent again."""

    rewrites = False

    def __init__(self, args: MLflow) -> None:
        self._args, self._queued = args, list[Metric]()

    def open(self, run: RunInfo) -> None:
        self._info, self._client = run, MlflowClient(self._args.tracking_uri)
        experiment = self._experiment(self._args.experiment or run.config["task"]["name"])
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            group = {"isobatch.sweep": run.group} if run.group else {}
            tags = self._args.tags | group | {TAG: run.id, "isobatch.directory": str(run.directory)}
            self._run = self._client.create_run(experiment, run_name=self._args.name or run.name, tags=tags).info.run_id
        stored = self._client.get_run(self._run).data
        self._send_params(run, stored.params)
        # A kill may have come between two metrics of a step, so each has a last step of its own.
        self._last = {key: self._last_step(key) for key in stored.metrics}

    def write(self, line: Line) -> None:
        at = int(1000 * self._info.time_of(line))
        for name, value in numbers(line).items():
            key = re.sub(r"[^\w\-. /:]", "_", name)
            if line["step"] > self._last.get(key, -1):
                self._queued.append(Metric(key, value, at, line["step"]))
        if len(self._queued) > METRICS // 2:
            self.flush()

    def flush(self) -> None:
        while self._queued:
            self._client.log_batch(self._run, metrics=self._queued[:METRICS])
            del self._queued[:METRICS]

    def close(self) -> None:
        self.flush()
        outcome = known_outcome(self._info.directory)
        self._client.set_terminated(self._run, STATUS.get(outcome.state, "FAILED") if outcome else "FAILED")

    def _experiment(self, name: str) -> str:
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run has made it meanwhile
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _last_step(self, key: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._run, key)), default=-1)

    def _send_params(self, run: RunInfo, stored: dict[str, str]) -> None:
        """Send the parameters that MLflow doesn't have yet: one that has a value keeps it."""
        new: list[Any] = [
            Param(re.sub(r"[^\w\-. /:]", "_", name), str(value)[:VALUE]) for name, value in run.params.items()
        ]
        new = [param for param in new if param.key not in stored]
        for start in range(0, len(new), PARAMS):
            self._client.log_batch(self._run, params=new[start : start + PARAMS])
