"""Estimate the memory of a planned run on hardware that may not be here, with what other settings would need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from isobatch.conf.compose import compose
from isobatch.conf.groups import TARGETS
from isobatch.conf.hardware import visible_gpus, workers_here
from isobatch.conf.terminal import say_if_slow
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import EnginePlacement, Plan
from isobatch.scaling.planning.capabilities import ABILITIES, placement
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.tuning.estimated import ADAFACTOR, Estimate, estimate
from isobatch.scaling.tuning.footprint import Footprint
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.prepare import prepare_data
from isobatch.trainers.tasks.task import make_task, open_data
from isobatch.trainers.tuning.estimate import Subject, trace, traced_from
from isobatch.trainers.tuning.meter import Meter
from isobatch.trainers.tuning.samples import LargeBatches

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

RANKS = 8  # for which sharding is estimated, if the plan has one rank


def outlook(config: RunConfig, plan: Plan) -> Estimate:
    """Return the estimate for ``plan``. It opens the data, makes the model on fake tensors and allocates nothing."""
    task = make_task(config)
    prepare_data(task, World.alone(), Stop(), config.cluster.timeout_s)
    with say_if_slow("opening the data …"):
        data = open_data(task, config)
    on_gpu, limit = _limit(config)
    meter = Meter(torch.device("cpu"))
    process = 0 if on_gpu else meter.now()
    batches = LargeBatches(data, task, config.seed)
    subject = Subject(config, task, plan.peak, batches, traced_from(batches.bytes, plan.granule), on_gpu)
    with say_if_slow("estimating the memory …"):
        return estimated(subject, plan, limit, process)


def estimated(subject: Subject, plan: Plan, limit: tuple[float, str], process: int) -> Estimate:
    """Return the estimate for ``plan`` under a limit in bytes, and the place where the limit comes from.

    Args:
        process: bytes of the process without the model.
    """
    config = subject.config
    found = trace(subject, process)
    others = {change: trace(other, process) for change, other in _others(subject, found)}
    shares = dict(engines(config, plan)) if subject.on_gpu or plan.world > 1 else {}  # ranks on a CPU share its memory
    automatic = config.optimizer.name if "optimizer" in config.chosen else ""
    return estimate(plan, found, limit, config.tune.margin, others, shares, automatic)


def _limit(config: RunConfig) -> tuple[bool, tuple[float, str]]:
    """Return whether the memory is a GPU's, and the limit in bytes, with where it comes from."""
    cluster = config.cluster
    if config.device != "cpu" and cluster.gpu_memory_gb is not None:
        return True, (cluster.gpu_memory_gb * 1e9, "cluster.gpu_memory_gb")
    if config.device != "cpu" and visible_gpus() and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        return True, (float(whole), torch.cuda.get_device_name(0))
    limit = Meter(torch.device("cpu"), workers_here(config), cluster.memory_gb).limit()
    return False, (float(limit.bytes), limit.source)


def _others(subject: Subject, found: Footprint) -> Iterator[tuple[str, Subject]]:
    """Yield settings that need less memory, by their overrides."""
    config = subject.config
    subject = replace(subject, sizes=tuple(one.per_gpu for one in found.passes[-2:]))
    if config.precision == "fp32":
        yield "precision=bf16", subject.with_config(precision="bf16")
    if not config.recompute and (blocks := found.blocks):
        yield f"recompute=[{blocks}]", subject.with_config(recompute=tuple(blocks.split(",")))
        if config.precision == "fp32":
            both = subject.with_config(recompute=tuple(blocks.split(",")), precision="bf16")
            yield f"precision=bf16 recompute=[{blocks}]", both
    able = ABILITIES[placement(config.engine).name, placement(config.engine).stage]
    if config.optimizer.name not in ("adafactor", "sgd", "custom") and able.carries(TARGETS["adafactor"]):
        optimizer = compose([ADAFACTOR]).optimizer
        other = subject.with_config(optimizer=optimizer)
        yield ADAFACTOR, replace(other, recipe=replace(subject.recipe, betas=(), eps=None))


def engines(config: RunConfig, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield plans of the run with engines that shard more than the plan's, with their overrides."""
    sharded, ranks = plan, ""
    if plan.world == 1:
        ranks = f" cluster.gpus_per_node={RANKS}"
        try:
            sharded = resolve(config, RANKS, plan.train_samples)
        except UserError:  # such as batch.even, for a batch that so many ranks can't have
            return
    own = ABILITIES[plan.engine.name, plan.engine.stage]
    for (name, stage), ability in ABILITIES.items():
        more = len(ability.shards) > len(own.shards) or (plan.world == 1 and ability.shards)
        able = ability.carries(config.optimizer.target) and (ability.bitwise or config.numerics != "bitwise")
        if more and able:
            stages = "" if stage is None else f" engine.stage={stage}"
            placed = replace(sharded, engine=EnginePlacement(name, stage, ability.shards))
            yield f"engine={name}{stages}{ranks}", placed
