"""Group runs that differ only in their seed, and name the groups by what differs between them. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from isobatch.scaling.report.run import Run

CUT_KEYS = ("batch.per_gpu", "batch.accumulation")  # how a batch is cut over ranks and passes
LR_KEYS = ("lr.peak", "lr.base", "lr.base_batch")
STILL_GOING = ("running", "queued", "stopped", "not started")  # reasons not to count a run that aren't failures
SHORT = {"optimizer.name": "optimizer", "control.name": "control", "lr.rule": "rule"}  # names in a label


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: what makes it differ from the other groups of its task.
        family: the part of the label beside batch and peak LR. No two groups have the same batch, LR and family.
        runs: all of them, by seed and age; ``counted``: those whose values are averaged.
        left_out: why each of the others isn't averaged, by directory.
    """

    label: str
    family: str
    global_size: int | None
    lr_peak: float | None
    optimizer: str | None
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]
    left_out: dict[str, str]

    @property
    def place(self) -> tuple[int, float, str]:
        """Return what orders groups: batch, peak LR and label."""
        return self.global_size or 0, self.lr_peak or 0.0, self.label


def why_not_counted(run: Run) -> str | None:
    """Return why a run can't be compared with others; None if it can."""
    if run.done.diverged:
        return "diverged"
    return None if run.state == "finished" else run.state if run.state != "—" else "not started"


def failure_of(run: Run) -> str:
    """Return why a run failed; "" if it can be compared, or may still go on."""
    why = why_not_counted(run) or ""
    return "" if why in STILL_GOING else why


def never_planned(run: Run) -> bool:
    """Return whether a run was rejected before it had a plan, so that there is nothing to compare."""
    return run.state == "refused" and run.recipe.identity is None


def task_of(run: Run) -> tuple[str, str]:
    """Return the task's name and target. Runs of different tasks are never compared."""
    return run.recipe.task or "", str(run.recipe.science.get("task._target_", ""))


def grouped(runs: Sequence[Run], in_order: bool = False) -> list[Group]:
    """Return the groups of the runs of one task, by family, batch and learning rate; or ``in_order`` of the runs."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(_key(run), []).append(run)
    firsts = [members[0] for members in together.values()]
    families = _families(firsts)
    labels = _labels(firsts, families)
    made = [
        _group(label, family, members)
        for label, family, members in zip(labels, families, together.values(), strict=True)
    ]
    return made if in_order else sorted(made, key=lambda group: (group.family, *group.place))


def _group(label: str, family: str, members: Iterable[Run]) -> Group:
    """Return the group of these runs. Of finished runs of one seed, the newest counts.

    Repeats of a seed train alike, so that counting them would make the spread look smaller than it is.
    """
    runs = tuple(sorted(members, key=lambda run: (run.recipe.seed or 0, _age(run))))
    whole = [run for run in runs if why_not_counted(run) is None]
    newest = {run.recipe.seed: run.directory for run in whole}
    reasons = {run.directory: why_not_counted(run) or f"repeats seed {run.recipe.seed}" for run in runs}
    counted = tuple(run for run in whole if run.recipe.seed is None or newest[run.recipe.seed] == run.directory)
    for run in counted:
        del reasons[run.directory]
    first = runs[0].recipe
    return Group(label, family, first.global_size, first.lr_peak, first.optimizer, runs, counted, reasons)


def run_label(group: Group, run: Run) -> str:
    """Return the name of a run within its report."""
    if len(group.runs) == 1:
        return group.label
    seed = run.recipe.seed
    if seed is None:
        return f"{group.label} · {run.directory}"
    label = f"{group.label} · seed {seed}"
    return label if [other.recipe.seed for other in group.runs].count(seed) == 1 else f"{label} · {run.directory}"


def _age(run: Run) -> tuple[float, str]:
    """Return what orders runs by the time of their last event."""
    times = [datetime.fromisoformat(event["time"]) for event in run.events if "time" in event]
    return max((_utc(time).timestamp() for time in times), default=0.0), run.directory


def _utc(time: datetime) -> datetime:
    """Return a time that is in UTC unless it says otherwise."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _key(run: Run) -> str:
    """Return a text that runs share if they differ only in their seed."""
    recipe = run.recipe
    content = [_science(run), recipe.global_size, recipe.lr_peak, recipe.optimizer]
    return json.dumps(content, sort_keys=True, default=str)


def _science(run: Run) -> dict[str, Any]:
    """Return the science of a run beside its global batch, which the plan has.

    How a batch is cut is hardware, unless the numerics are bitwise: then ``batch.per_gpu`` changes the result.
    """
    science = run.recipe.science
    cut = CUT_KEYS[1:] if science.get("numerics") == "bitwise" else CUT_KEYS
    left_out = () if run.recipe.global_size is None else ("batch.global_size", *cut)
    return {key: value for key, value in science.items() if key not in left_out}


def _families(runs: Sequence[Run]) -> list[str]:
    """Return the family of each group: the given keys that differ, and as many others as tell all groups apart."""
    given = {_leaf(key, run) for run in runs for key in run.recipe.given}
    sciences = list(map(_science, runs))
    every = dict.fromkeys(key for science in sciences for key in science)
    differ = [key for key in every if len({_text(science.get(key)) for science in sciences}) > 1]
    keys = [key for key in differ if key in given and key not in LR_KEYS]
    for key in differ:
        told_apart = len(set(_places(runs, keys)))
        if told_apart < len(runs) and len(set(_places(runs, [*keys, key]))) > told_apart:
            keys.append(key)
    places = _places(runs, keys)
    return [
        place[0]
        if places.count(place) == 1
        else " · ".join(filter(None, [place[0], run.recipe.identity or run.directory]))
        for place, run in zip(places, runs, strict=True)
    ]


def _places(runs: Sequence[Run], keys: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the family that ``keys`` make, the batch and the LR of each group, as labels show them."""
    return [(_family(run, keys), *_batch_and_lr(run)) for run in runs]


def _leaf(key: str, run: Run) -> str:
    """Return the key that stands for a given one: for a group, such as ``optimizer``, its name."""
    return f"{key}.name" if f"{key}.name" in run.recipe.science else key


def _family(run: Run, keys: Sequence[str]) -> str:
    parts = [(SHORT.get(key, key.rpartition(".")[2]), run.recipe.science.get(key)) for key in keys]
    return " · ".join(f"{name}={_text(value)}" for name, value in parts)


def _labels(runs: Sequence[Run], families: Sequence[str]) -> list[str]:
    """Return the label of each group: its batch, its LR where a batch has several, and its family."""
    places = [(family, *_batch_and_lr(run)) for family, run in zip(families, runs, strict=True)]
    rates = Counter((family, batch) for family, batch, _ in places)
    return [
        " · ".join(filter(None, [batch, lr if rates[family, batch] > 1 else "", family])) or "run"
        for family, batch, lr in places
    ]


def _batch_and_lr(run: Run) -> tuple[str, str]:
    size, lr = run.recipe.global_size, run.recipe.lr_peak
    return "" if size is None else f"batch {size:,}", "" if lr is None else f"LR {lr:.4g}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "off" if value is None else str(value)
