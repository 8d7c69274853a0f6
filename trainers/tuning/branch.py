"""Train short branches of a run's checkpoints at several batches, and tell the critical batch from their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import Plan
from isobatch.scaling.report.grid import grid
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Segment
from isobatch.scaling.tuning.branch import Branch, Branching, LeftOut, Point, judged, overall
from isobatch.trainers.tensors.manifest import Checkpoint
from isobatch.trainers.tuning.bench import Bench
from isobatch.trainers.tuning.starts import TRAIN_FIRST, Unfit, plan_here, spread, starts, unfit, verified

ALL, FEW = (1, 2, 4, 8, 16), (1, 4, 16)  # times half of the run's batch: k = ½ to 8; of one checkpoint, of several
SHARE = 15  # percent of the run that a branch takes
LEAST_STEPS = 8  # of a branch
POINTS = 16  # evaluations along a branch
# The weights are averaged because the noise of SGD, and so the loss, depends on the batch. All branches forget equally
# fast in samples. A 32nd of a branch is long enough to average, and short enough not to lag behind the weights.
HALF_LIVES = 32
LOCAL = (
    "a local critical batch holds at its checkpoint alone: where that was measured, it was 0.4 to 1.9 times the one of "
    "the samples that whole runs took to a target"
)


def measure(bench: Bench) -> dict[str, Any]:
    """Branch off the checkpoints of ``init_from``, or of the run directory.

    Raises:
        UserError: a checkpoint doesn't fit the model, or the task has no validation loss.
    """
    found = verified(bench, check(bench))
    course = [branch_off(bench, start, _multiples(found)) for start in found]
    critical, interval, note = overall(course)
    told = {"critical_batch": critical, "interval": interval, "note": note}
    return {**told, "course": [branching.plain() for branching in course]}


def check(bench: Bench) -> list[Checkpoint]:
    """Return the checkpoints to branch off.

    Raises:
        UserError: there is none, none leaves room for branches, or the task has no validation data.
    """
    if bench.validation is None:
        owner = type(bench.opened.task.own)
        problem = f"tune.parts=[branch] compares validation losses, but {owner.__qualname__} has no val_data()"
        fix = f"add val_data(self) to it in {owner.__module__}, which returns a data set like that of train_data(self)"
        raise UserError(problem, fix, "tune.parts")
    found = _starts(bench)
    for start in found:
        _sizes(bench, start, _multiples(found))
    return found


def branch_off(bench: Bench, start: Checkpoint, sizes: Sequence[int]) -> Branching:
    """Train and judge the branches of one checkpoint.

    Args:
        sizes: batches, as multiples of half of the run's batch.

    Raises:
        UserError: the branches would have too few steps, or the LR of another batch isn't known.
    """
    plan, position = plan_here(bench, start), start.header.samples
    batch = plan.stage_at(position).cut.global_size
    allowed, left_out = _sizes(bench, start, sizes)
    length = length_of(bench, plan) // allowed[-1] * allowed[-1]
    marks = sorted({-(-length * i // POINTS // allowed[-1]) * allowed[-1] for i in range(1, POINTS + 1)})
    branches, first = list[Branch](), None
    for size in allowed:
        try:
            branched = branch_plan(plan, position, size)
        except UserError as error:  # the rule doesn't hold at this batch, or the ranks can't share it equally
            left_out.append(LeftOut(size, str(error)))
            continue
        lr = branched.step_at(position).recipe.lr  # type: ignore[union-attr]
        curve, finite = _train(bench, start, branched, marks, first)
        first = curve[0]
        branches.append(Branch(size / batch, size, lr, tuple(curve), stable=finite))
        end = f"loss {curve[0].loss:.4g} → {curve[-1].loss:.4g}" if finite else "diverged"
        bench.say(f"step {start.header.step}, {plan.size(size)}, lr {lr:.3g}: {end}")
    for one in left_out:
        bench.say(f"step {start.header.step}: no branch at {plan.size(one.batch)}: {one.why}")
    return judged(position, length, batch, branches, left_out)


def _multiples(starts: Sequence[Checkpoint]) -> Sequence[int]:
    """Return the batches of the branches of each checkpoint, as multiples of half of the run's batch."""
    return ALL if len(starts) == 1 else FEW


def _sizes(bench: Bench, start: Checkpoint, sizes: Sequence[int]) -> tuple[list[int], list[LeftOut]]:
    """Return the batches of a checkpoint's branches, and those that would have too few steps.

    Raises:
        UserError: there are fewer than two, or the LR of another batch isn't known.
    """
    plan, position = plan_here(bench, start), start.header.samples
    half = max(1, plan.stage_at(position).cut.global_size // 2 // plan.granule) * plan.granule
    wanted, left = length_of(bench, plan), (plan.samples or 0) - position
    allowed = [size * half for size in sizes if size * half * LEAST_STEPS <= wanted]
    if len(allowed) < 2:
        raise _too_little_data(plan, position, half * sizes[1], wanted)
    rule_of_branches(plan, position)
    return allowed, [LeftOut(size * half, _too_short(size * half, wanted, left)) for size in sizes[len(allowed) :]]


def _too_short(batch: int, samples: int, left: int) -> str:
    """Return that a branch of this batch has too few steps, and the samples that it would need.

    Args:
        samples: of a branch; ``left``: of the run.
    """
    need = LEAST_STEPS * batch
    steps = f"{samples:,} samples are {counted(samples // batch, 'step')} of it, and a branch needs {LEAST_STEPS}"
    if need > left:
        return f"{steps}, which are {need:,} samples, and the checkpoint leaves {left:,} of the run"
    return f"{steps}: give tune.samples={need}sa or more"


def _too_little_data(plan: Plan, position: int, batch: int, samples: int) -> UserError:
    """Return the error of a checkpoint that has too few samples for two branches, the larger one at ``batch``."""
    assert plan.samples is not None
    need, left = batch * LEAST_STEPS, plan.samples - position
    problem = (
        f"too little data for branches: one needs {LEAST_STEPS} steps, which are {plan.size(need)} at a batch of "
        f"{batch:,}, and takes {plan.size(samples)}"
    )
    if need > left:
        fix = f"branch off a longer run, or an earlier checkpoint: this one leaves {plan.size(left)}"
        return UserError(problem, fix, "init_from")
    return UserError(problem, f"give tune.samples={need}sa or more", "tune.samples")


def branch_plan(plan: Plan, position: int, size: int) -> Plan:
    """Return the plan of a branch: from ``position`` on with a batch of ``size``, and the recipe by the run's rule.

    Raises:
        UserError: the run's batch changes with another rule than ``lr.rule``, the rule doesn't hold at this batch, or
            it can't be cut.
    """
    before = [segment for segment in plan.segments if segment.start_sample < position]
    return replace(plan, segments=tuple(before)).extend(Segment(position, size, rule_of_branches(plan, position)))


def rule_of_branches(plan: Plan, position: int) -> Rule:
    """Return the rule that carries the recipe to another batch at ``position``.

    Raises:
        UserError: the run's batch changes with another rule than ``lr.rule``.
    """
    before = [segment for segment in plan.segments if segment.start_sample < position]
    rule = before[0].rule.later
    if any(segment.rule != rule for segment in before[1:]):
        problem = "the batch of this run grows without its LR following lr.rule, so the LR of a branch isn't known"
        raise UserError(problem, "branch off a run with one batch, or with stages by lr.rule", "batch.schedule")
    return rule


def length_of(bench: Bench, plan: Plan) -> int:
    """Return the samples of a branch: ``tune.samples``, or a share of the run."""
    assert plan.samples is not None
    return bench.samples() or -(-plan.samples * SHARE // 100)


def _train(
    bench: Bench, start: Checkpoint, plan: Plan, marks: Sequence[int], first: Point | None
) -> tuple[list[Point], bool]:
    """Train one branch. Return the losses of its averaged weights, and whether training stayed finite.

    Args:
        marks: samples of the branch at which it is evaluated; the last one is its length.
        first: the loss at the start, if it is known.
    """
    position = start.header.samples
    decay = 0.5 ** (plan.stage_at(position).cut.global_size * HALF_LIVES / marks[-1])
    with bench.trial(plan, start) as trial:
        average = trial.engine.new_average()

        def loss() -> float:
            values = trial.evaluate(average)
            if "val/loss" not in values:
                problem = f"branches compare val/loss, but task {plan.task} evaluates {', '.join(values) or 'nothing'}"
                raise UserError(problem, "return it from task.evaluate, as 'loss'", "tune.parts")
            return values["val/loss"]

        curve = [first or Point(0, loss())]
        for mark in marks:
            while trial.state.samples < position + mark:
                taken = trial.step()
                assert taken is not None
                total = taken[1]
                if not math.isfinite(float(total.loss)):
                    return curve, False
                average.update(decay)
            found = loss()
            if not math.isfinite(found):
                return curve, False
            curve.append(Point(mark, found))
    return curve, True


# ---- checkpoints


def _starts(bench: Bench) -> list[Checkpoint]:
    """Return the checkpoints to branch off, the same on all ranks."""
    found = starts(bench)
    if not found:
        of = f"init_from={bench.config.init_from}" if bench.config.init_from else f"the run in {bench.run}"
        raise UserError(f"tune.parts has branch, but {of} has no checkpoint to branch off", TRAIN_FIRST, "init_from")
    unable = [_unable(bench, start) for start in found]
    if (why := unable[-1]) and all(unable):
        problem = f"no branch starts at step {found[-1].header.step} of the run: {why.reason}"
        raise UserError(problem, why.fix, "init_from")
    return spread([start for start, why in zip(found, unable, strict=True) if why is None])


def _unable(bench: Bench, start: Checkpoint) -> Unfit | None:
    """Return why no branch can start at a checkpoint; None if it can."""
    header, plan = start.header, plan_here(bench, start)
    assert plan.samples is not None
    assert plan.schedule is not None
    if why := unfit(bench, start):
        return why
    if header.samples < plan.schedule.warmup_samples:
        lasts = f"its warmup lasts {plan.size(plan.schedule.warmup_samples)}, which branches can't start in"
        return Unfit(lasts, TRAIN_FIRST)
    if header.samples + (length := length_of(bench, plan)) > plan.samples:
        left = max(0, plan.samples - header.samples)
        return Unfit(f"it leaves {plan.size(left)} of the run, and a branch takes {plan.size(length)}", TRAIN_FIRST)
    return None


# ---- what is printed


def tell(found: Mapping[str, Any]) -> str:
    """Return the branches as a table, and what they tell."""
    rows = [
        {
            "from sample": course["samples"], "k": branch["k"], "batch": branch["batch"], "LR": branch["lr"],
            "loss": branch["curve"][-1][1] if branch["stable"] else None, "efficiency": branch["efficiency"],
            "": _remark(branch, course["lr_limit"]),
        }
        for course in found["course"]
        for branch in course["branches"]
    ]  # fmt: skip
    told = list[str]()
    for course in found["course"]:
        at = f"from sample {course['samples']:,}:"
        told += [f"{at} no branch at a batch of {one['batch']:,}: {one['why']}" for one in course["left_out"]]
        told.append(f"{at} {_told(course)}")
    return "\n".join(["", grid(rows), *told, *([LOCAL] if found["critical_batch"] else [])])


def _remark(branch: Mapping[str, Any], limit: float | None) -> str:
    """Return what is to be said of a branch beside its numbers."""
    if not branch["stable"]:
        return "unstable" if limit is not None and branch["k"] >= limit else "learned nothing"
    return "below 1/2" if branch["efficiency"] is not None and not branch["admissible"] else ""


def _told(course: Mapping[str, Any]) -> str:
    limit = course["lr_limit"]
    limited = (
        f"; the LR leaves stability at {limit:g} × the batch" if limit and "stability" not in course["note"] else ""
    )
    if course["critical_batch"] is None:
        return f"critical batch not known: {course['note']}{limited}"
    low, high = course["interval"]
    return f"local critical batch {course['critical_batch']:,.0f} (95 % interval {low:,.0f} to {high:,.0f}){limited}"
