"""Write ``metrics.jsonl``, and report on rank 0's terminal and in ``events.jsonl``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import finite, write_atomic
from isobatch.conf.terminal import say
from isobatch.scaling.limits import one_line
from isobatch.scaling.noise import Smoothed
from isobatch.scaling.plan import Plan
from isobatch.scaling.reading import parse_json, read_bytes
from isobatch.scaling.report.grid import clock
from isobatch.scaling.stopping import EVALUATED
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.loop.readback import StepResult

PLAIN_EVERY_S = 5.0  # seconds between two plain lines


class Metrics:
    """Record the run on rank 0; on other ranks (``run`` is None) write and show nothing.

    A resumed run keeps the lines up to its state. Lines that can't be written, as on a full disk, are written with the
    next line.

    Args:
        live: show a progress bar on a terminal; off under a debugger, which needs the terminal.
    """

    def __init__(self, run: RunDir | None, state: TrainState, *, live: bool) -> None:
        self._state, self._run = state, run
        self._unwritten, self._warned_unwritten, self._warned_slow_save = b"", False, False
        self._file: IO[bytes] | None = None
        self._show: LiveLine | PlainLines | None = None
        if run:
            file = run.path / "metrics.jsonl"
            write_atomic(file, b"".join(lines_until(file, state)))
            self._file = open(file, "ab", buffering=0)  # noqa: SIM115
            self._show = LiveLine(state) if live and sys.stdout.isatty() else PlainLines(state)

    def step(self, result: StepResult, more: Mapping[str, float | None]) -> None:
        """Write a line of metrics for one step.

        Args:
            more: values to add, such as ``memory_gb``.
        """
        values = self._state.tally.values()
        line = self._line(result, values.pop("loss")) | values | dict(more)
        if self._state.skipped:
            line["skipped"] = self._state.skipped
        if self._state.noise:
            line |= noise_values(self._state.noise)
        self._write(line)
        if self._show:
            self._show.step(line)

    def failed(self, result: StepResult) -> None:
        """Write a line for the step that ends the run, since its loss or gradient isn't finite."""
        self._write(self._line(result, result.loss))

    def _line(self, result: StepResult, loss: float) -> dict[str, Any]:
        step = result.step
        return {
            "step": step.index + 1,
            "samples": step.stop,
            "epoch": self._state.epochs(step.stop),
            "loss": loss,
            "lr": step.recipe.lr,
            "grad_norm": result.grad_norm,
            "global_size": step.cut.global_size,
        }

    def evaluation(self, values: dict[str, float], took_s: float) -> None:
        """Write a line with the values of an evaluation at the state's position.

        Args:
            values: values by name, such as ``val/loss``.
            took_s: seconds that the evaluation took.
        """
        state = self._state
        line = {
            "step": state.steps,
            "samples": state.samples,
            "epoch": state.epochs(state.samples),
            "time_s": state.tally.time_s,
            "evaluation_s": took_s,
            **values,
        }
        self._write(line)
        if self._show:
            self._show.evaluation(line)

    def warn(self, text: str) -> None:
        """Report a warning on the terminal and in the events."""
        self.event("warning", text)

    def warn_of_slow_save(self, limit_s: float | None, took_s: float) -> None:
        """Warn once if a stop may take longer than the time until the scheduler kills the job.

        A stop takes one step, a save in progress, one more save, and the end of the job.

        Args:
            limit_s: time from the scheduler's signal to its kill; None if not known.
        """
        if limit_s is None or took_s <= limit_s / 2 or self._warned_slow_save:
            return
        self._warned_slow_save = True
        self.warn(
            f"a save took {took_s:.1f} s, but a job is killed {limit_s:g} s after its signal to stop (Slurm's "
            "KillWait), which may not suffice for a step, a save in progress and one more save; after a stop without "
            "notice, such as a preemption, steps since the last checkpoint are repeated: checkpoint.every limits them"
        )

    def event(self, event: str, text: str, **fields: Any) -> None:
        """Report a warning of the kind ``event``."""
        tell(self._run, event, text, **fields)

    def note(self, event: str, text: str, **fields: Any) -> None:
        """Report a fact, which is no warning."""
        if self._run:
            with suppress(OSError):
                self._run.event(event, text=text, **fields)
            say(text)

    def close(self) -> None:
        """Restore the terminal, and write the remaining lines."""
        if self._show:
            self._show.close()
        if self._file:
            self._flush()
            self._file.close()
        self._show = self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._unwritten += json.dumps(finite(line)).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        assert self._file
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned_unwritten:
                say(f"warning: metrics.jsonl can't be written, and is tried again with the next line: {error}")
            self._warned_unwritten = True


def noise_values(noise: Smoothed) -> dict[str, float | None]:
    """Return the gradient noise scale for a line of metrics; values that aren't known yet are None.

    ``noise/scale``, ``noise/low``, ``noise/high``: the scale and its 95 % interval, in samples. ``noise/grad_sq``,
    ``noise/trace``: the averages of |G|² and tr Σ (see scaling/noise.py), in the norm that the event ``noise`` names.
    The average of |G|² can be negative while noise dominates.
    """
    scale, averages = noise.scale(), noise if noise.count else None
    known = {f"noise/{name}": getattr(scale, name, None) for name in ("scale", "low", "high")}
    return known | {f"noise/{name}": getattr(averages, name, None) for name in ("grad_sq", "trace")}


def evaluations_until(file: Path, state: TrainState) -> list[Mapping[str, Any]]:
    """Return the evaluations in a metrics file up to ``state``."""
    lines = map(parse_json, lines_until(file, state))
    return [line for line in lines if "loss" not in line]


def lines_until(file: Path, state: TrainState) -> list[bytes]:
    """Return the lines of a metrics file up to ``state``, without those that the run writes again from there."""
    kept = []
    for line in read_bytes(file).splitlines(keepends=True) if file.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            content = parse_json(line)
            last, evaluates = content["step"] == state.steps, "loss" not in content
            # an evaluation that is owed is repeated; an interval that goes on wasn't due, but ended early
            repeated = last and (state.evaluation_owed if evaluates else state.tally.interval.samples > 0)
            if 0 <= content["step"] <= state.steps and not repeated and line.endswith(b"\n"):
                kept.append(line)
    return kept


def tell(run: RunDir | None, event: str, text: str, **fields: Any) -> None:
    """Print a warning, and record it in ``events.jsonl`` if the disk has room; do nothing if ``run`` is None."""
    if run:
        with suppress(OSError):
            run.event(event, text=text, **fields)
        say(f"warning: {text}")


class PlainLines:
    """Print a line every few seconds, for logs and pipes."""

    def __init__(self, state: TrainState) -> None:
        self._state, self._started, self._begun_at = state, time.perf_counter(), state.samples
        self._next = self._started  # show the first step, since most errors show there
        self._last: dict[str, Any] = {}

    def step(self, line: dict[str, Any]) -> None:
        now, self._last = time.perf_counter(), line
        if now < self._next and line["step"] != self._state.plan.steps:
            return
        self._next = now + PLAIN_EVERY_S
        pace_s = (now - self._started) / max(1, line["samples"] - self._begun_at)
        left = max(0, (self._state.plan.samples or 0) - line["samples"])
        self._print(line, f"{_figures(line, self._state.plan)}  ETA {clock(pace_s * left)}")

    def evaluation(self, line: dict[str, Any]) -> None:
        loss = f"loss {self._last['loss']:.4f}  " if self._last.get("step") == line["step"] else ""
        self._print(line, loss + _values(line, *EVALUATED))

    def close(self) -> None:
        pass

    def _print(self, line: dict[str, Any], text: str) -> None:
        say(f"step {line['step']}/{self._state.plan.steps}  epoch {line['epoch']:.2f}  {text}")


class LiveLine:
    """Show a progress bar on a terminal."""

    def __init__(self, state: TrainState) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        step, figures = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[text]}")
        self._progress = Progress(step, BarColumn(), figures, TextColumn("ETA"), TimeRemainingColumn())
        self._progress.start()
        self._state = state
        self._bar = self._progress.add_task("", total=state.plan.steps, completed=state.steps, text="")

    def step(self, line: dict[str, Any]) -> None:
        plan = self._state.plan  # a controller changes it
        self._progress.update(self._bar, completed=line["step"], total=plan.steps, text=_figures(line, plan))

    def evaluation(self, line: dict[str, Any]) -> None:
        text = f"step {line['step']}  epoch {line['epoch']:.2f}  {_values(line, *EVALUATED)}"
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _figures(line: dict[str, Any], plan: Plan) -> str:
    batch = f"batch {plan.sized(line['global_size']):,}  " * (plan.control is not None or len(plan.stages) > 1)
    pace = f"{batch}lr {line['lr']:.3g}  {line['samples_per_s']:,.0f} samples/s"
    return "  ".join(filter(None, [f"loss {line['loss']:.4f}", _values(line, "train/"), pace]))


def _values(line: dict[str, Any], *kinds: str) -> str:
    values = {name: value for name, value in line.items() if name.startswith(kinds)}
    return "  ".join(f"{one_line(name)} {value:.4f}" for name, value in values.items())
