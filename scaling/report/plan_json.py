"""A plan as JSON, both ways: ``plan.json``, and what ``action=plan output=json`` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from isobatch.conf.groups import OPTIMIZERS
from isobatch.scaling.families import FAMILIES
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.advice import warnings
from isobatch.scaling.planning.capabilities import check_placement
from isobatch.scaling.reading import parse_json
from isobatch.scaling.report.plan_table import lr_why, moves
from isobatch.scaling.rules import PARTS


def to_json(plan: Plan) -> str:
    """Write the plan as JSON: its summary, and its fields (``asked`` holds those the summary gives solved)."""
    fields = asdict(plan)
    fields["optimizer"] |= {part: getattr(plan.peak, part) for part in PARTS}
    asked = {name: fields.pop(name) for name in ("world", "per_gpu", "accumulation")}
    return json.dumps({**summary(plan), **fields, "asked": asked}, indent=1, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Plan:
    """Read what ``to_json`` wrote.

    Raises:
        ValueError: not JSON, a field is missing or of the wrong kind, or the summary's numbers aren't those that
            follow from the fields (the file was edited or damaged). What an earlier version didn't write isn't missed.
    """
    try:
        stored = parse_json(text)
        fields = {**stored, **stored["asked"]}
        mine = json.dumps({name: fields[name] for name in Plan.__dataclass_fields__ if name in fields})
        plan = _adapter().validate_json(mine, strict=True)
        if plan.family not in (None, *FAMILIES):
            raise ValueError(f"task.family={plan.family}: known are {', '.join(FAMILIES)}")
        check_placement(plan.engine)
        if plan.optimizer.name not in OPTIMIZERS:
            raise ValueError(f"optimizer={plan.optimizer.name}: known are {', '.join(OPTIMIZERS)}")
        was, now = _numbers(text), _numbers(to_json(plan))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"not a plan: {'.'.join(map(str, first['loc']))}: {first['msg']:.300}") from None
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"not a plan: {type(error).__name__}: {' '.join(str(error).split()):.300}") from None
    wrong = [name for name in now if name in was and not _agree(was[name], now[name])]
    if wrong:
        raise ValueError(f"the plan contradicts itself in {', '.join(wrong)}: it was edited or damaged")
    return plan


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def summary(plan: Plan) -> dict[str, Any]:
    """Return what ``plan.json`` says on top of the fields it is read back from. Sizes in samples."""
    outright = plan.base_source == "peak"
    return {
        "global_size": plan.cut.global_size,
        "per_gpu": plan.cut.per_gpu,
        "accumulation": plan.cut.accumulation,
        "world_size": plan.world,
        "micro_batches": plan.cut.micro_batches,
        "idle": plan.cut.idle,
        "steps": plan.steps,
        "added_samples": plan.added,
        "epochs": plan.epochs,
        "lr": {
            "base": None if outright else plan.base.lr,
            "base_batch": None if outright else plan.base_batch,
            "rule": None if outright else plan.segments[0].rule.name,
            "factor": None if outright else plan.peak.lr / plan.base.lr,
            "peak": plan.peak.lr,
            "warmup_samples": plan.schedule.warmup_samples if plan.schedule else None,
            "noise_temperature": plan.temperature(plan.stages[0]),
            "why": lr_why(plan),
            "moves": moves(plan),
        },
        "stages": [
            {
                "start_sample": stage.start,
                "first_step": stage.first_step + 1,
                "global_size": stage.cut.global_size,
                "per_gpu": stage.cut.per_gpu,
                "accumulation": stage.cut.accumulation,
                "micro_batches": stage.cut.micro_batches,
                "peak": asdict(stage.peak),
            }
            for stage in plan.stages
        ],
        "warnings": warnings(plan),
    }


def _agree(was: Any, now: Any) -> bool:
    """Tell whether two values are the same, as far as the first has keys of the second."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(_agree(was[name], now[name]) for name in now if name in was)
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_agree, was, now))
    return bool(was == now) and type(was) is type(now)


def _numbers(text: str) -> dict[str, Any]:
    """Return a plan's JSON without its explanations, floats to the digits that all machines agree on."""
    content = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.9g}"))
    return {**content, "warnings": None, "lr": {**content["lr"], "why": None, "moves": None}}
