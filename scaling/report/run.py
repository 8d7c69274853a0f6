"""Read one run directory: what was planned, how far the run got, its measures and its curves. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from isobatch.conf.identity import science_of
from isobatch.conf.rundir.reading import HUGE, MEASURES, RunFiles, read_run
from isobatch.scaling.report.curves import Curves, curves_of
from isobatch.scaling.report.measures import Direction, Measure, direction_of
from isobatch.scaling.stopping import EVALUATED

NO_CAUSE = "ended without recording a cause: it was killed, or its machine went down"
ENDS = ("stopped", "crashed", "oom", "refused", "requeue", "cancelled", "not_requeued", "restart")
OF_PLAN = ("identity", "task", "global_size", "per_gpu", "world_size", "seed", "steps", "samples")
PARTS = 10  # the first and the last tenth of the losses tell whether a run diverged
FEWEST, MARGIN = 5, 1.3  # losses that tell whether a run diverged, and how far above the first one they are then
NOISE = 4  # middle changes from one loss to the next: of independent noise, under 1 % of flat runs rise by more

Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What ``plan.json`` and ``config.yaml`` say. A value that they lack is None.

    Attributes:
        steps, samples: of the whole run.
        science: the dotted keys that make the run what it is, except the seed.
        given: the keys that the user gave.
        stop_at: the target at which the run ends.
    """

    identity: str | None = None
    task: str | None = None
    optimizer: str | None = None
    global_size: int | None = None
    per_gpu: int | None = None
    world_size: int | None = None
    lr_peak: float | None = None
    seed: int | None = None
    steps: int | None = None
    samples: int | None = None
    science: dict[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    stop_at: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run got.

    Attributes:
        step, samples: completed.
        time_s: seconds of training; None if an earlier version recorded the run.
        samples_per_s: samples over ``time_s``; without a time the middle one of the logged speeds.
        epoch: epochs completed.
        eta_s: seconds to the end at the last logged speed; only while running.
        noise_scale: the last known gradient noise scale, in samples.
        gradient_variance: tr Σ/B at the last measurement: the variance of a step's gradient, over all parameters.
        diverged: the last loss isn't finite, or the loss ended above its start by more than its noise.
        sharpness, perturbed: as ``action=tune`` measured them at the end (see trainers/tuning/README.md).
    """

    step: int
    samples: int
    time_s: float | None
    samples_per_s: float | None
    epoch: float | None
    eta_s: float | None
    noise_scale: float | None
    gradient_variance: float | None
    diverged: bool
    sharpness: float | None
    perturbed: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """Describe a run from its directory.

    Attributes:
        state: the state in ``outcome.json``; ``queued``: a job waits; ``died``: the outcome is ``running``, but no
            process works on the run; ``damaged``: a file is invalid, and ``cause`` names it; ``—``: no outcome.
        recorded: the state in ``outcome.json``, or ``—``.
        early: the ``stop`` key that ended a finished run before the end of its plan, and why; empty if none did.
        cause: why the run last stopped, or ended early.
        damage: the problem of a damaged file, which other fields leave out.
        job: the last Slurm job submitted for the run or working on it; ``queue``: its state; None: the job is over.
        loss: the last finite loss; ``evaluation``: the values of the last evaluation by name.
        measures: the loss and the values that the task measures, by name.
        tuned: the results of ``action=tune``, by part.
    """

    directory: str
    state: str
    recorded: str
    early: str
    cause: str | None
    damage: str | None
    job: str | None
    queue: str | None
    recipe: Recipe
    done: Progress
    loss: float | None
    evaluation: dict[str, float | None]
    measures: dict[str, Measure]
    curves: Curves = field(repr=False)
    events: Lines = field(repr=False)
    tuned: Mapping[str, Any] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Return the run as plain values: all of ``action=runs output=json``, and an entry of ``report.json``."""
        recipe, done = asdict(self.recipe), asdict(self.done)
        planned = {"planned_steps": recipe.pop("steps"), "planned_samples": recipe.pop("samples")}
        settings = {key: recipe["science"].get(key) for key in recipe["given"] if key in recipe["science"]}
        del recipe["science"], recipe["given"], recipe["stop_at"]
        told = {name: getattr(self, name) for name in ("directory", "state", "cause", "job", "queue")}
        done["steps"] = done.pop("step")
        measures = {name: measure.summary() for name, measure in self.measures.items()}
        return {**told, **recipe, **planned, **done, "settings": settings, "metrics": measures}


def read(
    directory: Path,
    works: bool = False,
    queue: Mapping[str, str] | None = None,
    directions: Mapping[str, Direction] | None = None,
) -> Run:
    """Read the run in ``directory``.

    Args:
        works: a launch is working on the run now.
        queue: Slurm's states of unfinished jobs, by id.
        directions: which direction of a measure is better, where its name doesn't say.
    """
    files = read_run(directory)
    events = files.events
    jobs = [str(event["job"]) for event in events if event.get("event") in ("submitted", "start") and "job" in event]
    waits = (queue or {}).get(jobs[-1]) if jobs else None
    recorded = state = str(files.outcome.state) if files.outcome else "—"
    if waits and waits.startswith("PENDING"):
        state = "queued"
    elif state == "running" and not works:
        state = "died"
        events = [*events, {"event": "crashed", "cause": NO_CAUSE}]  # which the next start will record
    early = files.outcome.cause if files.outcome and recorded == "finished" else ""
    causes = [event["cause"] for event in events if event.get("event") in ENDS and event.get("cause")]
    return Run(
        directory=str(directory),
        state="damaged" if files.damage else state,
        recorded=recorded,
        early=early,
        cause=files.damage or early or (causes[-1] if causes else None),
        damage=files.damage,
        job=jobs[-1] if jobs else None,
        queue=waits,
        recipe=_recipe(files),
        done=_progress(files, running=state == "running"),
        loss=_last(files.metrics, "loss"),
        evaluation=_evaluation(files.metrics),
        measures=_measures(files.metrics, directions or {}),
        curves=curves_of(files.metrics),
        events=files.events,
        tuned=files.tuned,
    )


def _recipe(files: RunFiles) -> Recipe:
    plan, config = files.plan, files.config
    science = {key: value for key, value in science_of(config).items() if key not in ("seed", "format")}
    size = science.get("batch.global_size")
    of_config = {
        "task": science.get("task.name"),
        "seed": config.get("seed"),
        "global_size": size if size != "all" else None,
    }
    known = of_config | plan  # a run may have lost its plan
    return Recipe(
        **{name: known.get(name) for name in OF_PLAN},
        optimizer=(plan.get("optimizer") or {"name": science.get("optimizer.name")}).get("name"),
        lr_peak=(plan.get("lr") or {"peak": science.get("lr.peak")}).get("peak"),
        science=science,
        given=tuple(config.get("given") or ()),
        stop_at=(config.get("stop") or {}).get("at"),
    )


def _progress(files: RunFiles, running: bool) -> Progress:
    logged = [line for line in files.metrics if "loss" in line]
    last, end = logged[-1] if logged else {}, files.metrics[-1] if files.metrics else {}
    ended = files.outcome
    samples = max(ended.samples if ended else 0, end.get("samples", 0))
    seconds, trace = _last(files.metrics, "time_s"), _last(logged, "noise/trace")
    batch = _last(logged, "global_size")
    speeds = [line["samples_per_s"] for line in logged if line.get("samples_per_s")]
    planned, pace = files.plan.get("samples"), last.get("samples_per_s") if running else None
    left = None if planned is None or "samples" not in last else max(0, planned - last["samples"])
    return Progress(
        step=max(ended.step if ended else 0, end.get("step", 0)),
        samples=samples,
        time_s=seconds,
        samples_per_s=_ratio(end.get("samples"), seconds) or _middle(speeds),
        epoch=end.get("epoch"),
        eta_s=_ratio(left, pace),
        noise_scale=_last(logged, "noise/scale"),
        gradient_variance=_ratio(trace, batch),
        diverged=_diverged([line["loss"] for line in logged]),
        **{name: (files.tuned.get("sharpness") or {}).get(name) for name in ("sharpness", "perturbed")},
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    """Return a quotient; None if a value is missing or the quotient is too large to mean anything."""
    found = above / below if above is not None and below else None
    return found if found is not None and abs(found) <= HUGE else None


def _last(lines: Lines, name: str) -> Any:
    """Return the last known value of a name."""
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _diverged(losses: Sequence[float | None]) -> bool:
    """Return whether the last loss isn't finite, or the loss ended above its start by more than its noise.

    Of FEWEST losses or more, all of the last half are then above MARGIN times a positive first one. Or, of 2·PARTS or
    more, the median of the last tenth is above the largest of the first tenth by more than NOISE times the median
    change from one loss to the next.
    """
    if losses and losses[-1] is None:
        return True
    known = [loss for loss in losses if loss is not None]
    if len(known) >= FEWEST and 0 < MARGIN * known[0] < min(known[len(known) // 2 :]):
        return True
    if len(known) < 2 * PARTS:
        return False
    part = len(known) // PARTS
    rise = statistics.median(known[-part:]) - max(known[:part])
    return rise > 0 and rise > NOISE * statistics.median(abs(after - before) for before, after in pairwise(known))


def _evaluation(lines: Lines) -> dict[str, float | None]:
    """Return the values of the last evaluation, by name."""
    for line in reversed(lines):
        if values := {name: value for name, value in line.items() if name.startswith(EVALUATED)}:
            return values
    return {}


def _measures(lines: Lines, directions: Mapping[str, Direction]) -> dict[str, Measure]:
    """Return the measures of a run's lines: the loss first, then those of evaluations and of training."""
    found: dict[str, Measure] = {}
    names_of: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        keys = tuple(line)
        if keys not in names_of:
            names_of[keys] = [key for key in keys if key == "loss" or key.startswith(MEASURES)]
            for name in names_of[keys]:
                found.setdefault(name, Measure(directions.get(name) or direction_of(name)))
        for name in names_of[keys]:
            found[name].add(line[name], line)
    return dict(sorted(found.items(), key=lambda pair: (pair[0] != "loss", pair[0].startswith("train/"))))
