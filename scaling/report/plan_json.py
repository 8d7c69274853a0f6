"""Convert a plan to and from JSON: ``plan.json`` and the output of ``action=plan output=json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def to_json(plan: Plan, more: Mapping[str, Any] | None = None) -> str:
    """Return the plan as JSON: its summary, and its fields. ``asked`` holds the sizes as requested.

    Args:
        more: objects to add, such as the estimate of its memory.
    """
    fields = asdict(plan)
    fields["optimizer"] |= {part: getattr(plan.peak, part) for part in PARTS}
    asked = {name: fields.pop(name) for name in ("world", "per_gpu", "accumulation")}
    whole = {**summary(plan), **fields, "asked": asked, **(more or {})}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Plan:
    """Parse the JSON of ``to_json``, also of an earlier version with fewer keys in its summary.

    Raises:
        ValueError: the text isn't JSON, a field is missing or has the wrong type, or the summary doesn't follow from
            the fields because the file was edited or damaged.
    """
    try:
        stored = parse_json(text)
        fields = {**stored, **stored["asked"]}
        own_fields = json.dumps({name: fields[name] for name in Plan.__dataclass_fields__ if name in fields})
        plan = _adapter().validate_json(own_fields, strict=True)
        if plan.family not in (None, *FAMILIES):
            raise ValueError(f"task.family={plan.family}: known families are {', '.join(FAMILIES)}")
        check_placement(plan.engine)
        if plan.optimizer.name not in OPTIMIZERS:
            raise ValueError(f"optimizer={plan.optimizer.name}: known optimizers are {', '.join(OPTIMIZERS)}")
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
    """Return the derived values that ``plan.json`` has in addition to the plan's fields. Sizes are in samples."""
    peak_given = plan.base_source == "peak"
    return {
        "global_size": plan.cut.global_size,
        "per_gpu": None if plan.measures else plan.cut.per_gpu,
        "accumulation": None if plan.measures else plan.cut.accumulation,
        "world_size": plan.world,
        "micro_batches": plan.cut.micro_batches,
        "idle": plan.cut.idle,
        "steps": plan.steps,
        "added_samples": plan.added,
        "epochs": plan.epochs,
        "lr": {
            "base": None if peak_given else plan.base.lr,
            "base_batch": None if peak_given else plan.base_batch,
            "rule": None if peak_given else plan.segments[0].rule.name,
            "factor": None if peak_given else plan.peak.lr / plan.base.lr,
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
    """Return True if two values are equal, ignoring keys that only one of them has."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(_agree(was[name], now[name]) for name in now if name in was)
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_agree, was, now))
    return bool(was == now) and type(was) is type(now)


def _numbers(text: str) -> dict[str, Any]:
    """Return a plan's JSON without explanations, floats rounded to the digits that all machines agree on."""
    content = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.9g}"))
    return {**content, "warnings": None, "lr": {**content["lr"], "why": None, "moves": None}}
