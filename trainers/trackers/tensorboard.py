"""TensorBoard: event files in ``tensorboard/`` of the run directory. ``tensorboard --logdir runs`` shows all runs."""

from __future__ import annotations

import json
from typing import Any

import yaml
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.text import metadata as text
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from isobatch.conf.trackers import TensorBoard
from isobatch.trainers.trackers.tracker import Line, RunInfo, numbers


class Adapter:
    """Write one event file, which each start rewrites: an event can't be taken out of a file."""

    rewrites = True

    def __init__(self, args: TensorBoard) -> None:
        pass

    def open(self, run: RunInfo) -> None:
        self._run, folder = run, run.directory / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(0, run.began, session_log=start)  # a TensorBoard that runs forgets the steps of earlier files
        values = [
            _text("plan", json.dumps(run.plan, indent=1)),
            _text("config", yaml.safe_dump(run.config, sort_keys=False)),
            _hparams(run.params),
        ]
        self._add(0, run.began, summary=summary_pb2.Summary(value=values))

    def write(self, line: Line) -> None:
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers(line).items()]
        self._add(line["step"], self._run.time_of(line), summary=summary_pb2.Summary(value=values))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, time: float, **content: Any) -> None:
        self._writer.add_event(event_pb2.Event(wall_time=time, step=step, **content))


def _text(tag: str, content: str) -> Any:
    indented = "".join(f"    {line}\n" for line in content.splitlines())  # a block of code in Markdown
    described = text.create_summary_metadata(display_name=tag, description="")
    return summary_pb2.Summary.Value(tag=tag, metadata=described, tensor=make_tensor_proto(indented.encode()))


def _hparams(params: dict[str, Any]) -> Any:
    started = plugin_data_pb2.SessionStartInfo()
    for name, value in params.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(started.hparams[name], field, value)
    content = plugin_data_pb2.HParamsPluginData(session_start_info=started)
    described = hparams.create_summary_metadata(content)
    return summary_pb2.Summary.Value(tag=hparams.SESSION_START_INFO_TAG, metadata=described, tensor=hparams.NULL_TENSOR)
