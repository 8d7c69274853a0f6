"""Carry the tuned batch of a language model to this run's amount of data, by a published law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.law import batch_for_data
from isobatch.trainers.tuning.bench import Bench

TIMES = (0.1, 1, 10, 100)  # of the run's data, for which the batch is told


def measure(bench: Bench) -> dict[str, Any]:
    """Return the batch that the law gives for the run's data, and for other amounts of it.

    Raises:
        UserError: the task isn't a language model.
    """
    config, plan = bench.config, bench.opened.plan
    tuned = config.task.tuned.get(config.optimizer.name)
    stated = tuned.samples if tuned and plan.base_source == "tuned" else None
    assert plan.samples is not None
    found = batch_for_data(plan.family, plan.samples, plan.base_batch, stated or plan.samples)
    if found.batch is None:
        raise UserError(f"tune.parts has law, but {found.why}", "leave it out", "tune.parts", "law")
    why = found.why
    if not stated:
        of = f"the batch of {plan.base_batch:,} is taken to be tuned on as much data as this run has"
        why = f"{of}; give task.tuned.{config.optimizer.name}.samples if it wasn't"
    course = []
    for samples in (plan.samples * times for times in TIMES):
        there = batch_for_data(plan.family, samples, found.batch, plan.samples)
        course.append({"samples": samples, "batch": there.batch, "low": there.low, "high": there.high})
    return {**asdict(found), "why": why, "tuned": stated is not None, "course": course}


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the law's batch."""
    return f"a batch of {found['batch']:,.0f} samples: {found['why']}"
