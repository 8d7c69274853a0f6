"""Group runs that differ only in their seed, and name the groups by what differs between them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isobatch.scaling.report.run import Run

BATCH_KEYS = ("batch.global_size", "batch.per_gpu", "batch.accumulation")
LR_KEYS = ("lr.peak", "lr.base", "lr.base_batch")
STILL_GOING = ("running", "queued", "stopped", "not started")  # reasons not to count a run that aren't failures
SHORT = {"optimizer.name": "optimizer", "lr.rule": "rule"}  # names in a label


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: what makes it differ from the other groups of its task.
        family: the part of the label beside batch and LR: "" if nothing else differs.
        lr: the swept learning rate: ``lr.base`` if that was swept, else the peak.
        runs: all of them, by seed and age; ``counted``: those whose values are averaged.
    """

    label: str
    family: str
    global_size: int | None
    lr: float | None
    lr_peak: float | None
    optimizer: str | None
    runs: tuple[Run, ...]

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if self.left_out(run) is None]

    def repeats(self, run: Run) -> list[Run]:
        """Return the other runs of a run's seed."""
        seed = run.recipe.seed
        return [other for other in self.runs if other is not run and seed is not None and other.recipe.seed == seed]

    def left_out(self, run: Run) -> str | None:
        """Return why a run isn't averaged: it isn't a whole run, or a newer one has its seed; None if it is.

        Repeats of a seed train alike, so that counting them would make the spread look smaller than it is.
        """
        if why := why_not_counted(run):
            return why
        newer = any(why_not_counted(other) is None and _age(other) > _age(run) for other in self.repeats(run))
        return f"repeats seed {run.recipe.seed}" if newer else None


def why_not_counted(run: Run) -> str | None:
    """Return why a run can't be compared with others; None if it can."""
    if run.done.diverged:
        return "diverged"
    return None if run.state == "finished" else run.state if run.state != "—" else "not started"


def never_planned(run: Run) -> bool:
    """Return whether a run was rejected before it had a plan, so that there is nothing to compare."""
    return run.state == "refused" and run.recipe.task is None


def task_of(run: Run) -> tuple[str, str]:
    """Return the task's name and target. Runs of different tasks are never compared."""
    return run.recipe.task or "?", str(run.recipe.science.get("task._target_", ""))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the groups of the runs of one task, ordered by family, batch and learning rate."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(_key(run), []).append(run)
    groups = [members[0] for members in together.values()]
    keys = _varying(groups)
    families = [_family(run, keys) for run in groups]
    base_swept = len({run.recipe.science.get("lr.base") for run in groups}) > 1
    lrs = [run.recipe.science.get("lr.base") if base_swept else run.recipe.lr_peak for run in groups]
    labels = _labels(groups, families, lrs)
    made = [
        Group(
            label, family, run.recipe.global_size, lr, run.recipe.lr_peak, run.recipe.optimizer,
            tuple(sorted(members, key=lambda member: (member.recipe.seed or 0, _age(member)))),
        )
        for run, family, lr, label, members in zip(groups, families, lrs, labels, together.values(), strict=True)
    ]  # fmt: skip
    return sorted(made, key=lambda group: (group.family, group.global_size or 0, group.lr or 0, group.label))


def run_label(group: Group, run: Run) -> str:
    """Return the name of a run within its report."""
    if len(group.runs) == 1:
        return group.label
    label = f"{group.label} · seed {run.recipe.seed}"
    return f"{label} · {run.directory}" if group.repeats(run) else label


def _age(run: Run) -> tuple[str, str]:
    """Return what orders runs by the time of their last event."""
    return max((str(event.get("time", "")) for event in run.events), default=""), run.directory


def _key(run: Run) -> str:
    """Return a text that runs share if they differ only in their seed."""
    recipe = run.recipe
    content = [recipe.science, recipe.global_size, recipe.lr_peak, recipe.optimizer]
    return json.dumps(content, sort_keys=True, default=str)


def _varying(runs: Sequence[Run]) -> list[str]:
    """Return the given keys beside batch and learning rate that differ between runs; if only others do, those."""
    given = {_leaf(key, run) for run in runs for key in run.recipe.given}
    every = dict.fromkeys(key for run in runs for key in run.recipe.science if key not in (*BATCH_KEYS, *LR_KEYS))
    differ = [key for key in every if len({_text(run.recipe.science.get(key)) for run in runs}) > 1]
    return [key for key in differ if key in given]


def _leaf(key: str, run: Run) -> str:
    """Return the key that stands for a given one: for a group, such as ``optimizer``, its name."""
    return f"{key}.name" if f"{key}.name" in run.recipe.science else key


def _family(run: Run, keys: Sequence[str]) -> str:
    parts = [(SHORT.get(key, key.rpartition(".")[2]), run.recipe.science.get(key)) for key in keys]
    return " · ".join(f"{name}={_text(value)}" for name, value in parts)


def _labels(runs: Sequence[Run], families: Sequence[str], lrs: Sequence[float | None]) -> list[str]:
    """Return the label of each group: its batch, its LR where a batch has several, and its family."""
    batches = [run.recipe.global_size for run in runs]
    places = list(zip(families, batches, strict=True))
    several = {
        place for place in places if len({lr for other, lr in zip(places, lrs, strict=True) if other == place}) > 1
    }
    labels = []
    for place, lr in zip(places, lrs, strict=True):
        batch = "" if place[1] is None else f"batch {place[1]:,}"
        rate = f"LR {lr:.4g}" if place in several and lr is not None else ""
        labels.append(" · ".join(filter(None, [batch, rate, place[0]])) or "run")
    return [
        label if labels.count(label) == 1 else f"{label} · {run.recipe.identity or run.directory}"
        for label, run in zip(labels, runs, strict=True)
    ]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "off" if value is None else str(value)
