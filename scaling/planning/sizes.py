"""Convert the batch sizes that a config asks for to samples."""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.conf.identity import global_size_rules
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import solve
from isobatch.scaling.plan import Plan


@dataclass(frozen=True, slots=True)
class Sizes:
    """Hold the first stage's global batch and the sizes that every stage's cut is solved from, in samples."""

    global_size: int
    per_gpu: int | None
    accumulation: int | None


def first_sizes(config: RunConfig, world: int, train_samples: int | None) -> Sizes:
    """Return the sizes of the first stage.

    Raises:
        UserError: they contradict each other, aren't known, or aren't a whole number of samples.
    """
    batch, per_sample = config.batch, size_of_a_sample(config)
    global_size = asked(config, train_samples)
    if batch.schedule and (start := batch.schedule.start):
        unused = batch.schedule.kind != "ramp" or batch.schedule.last is not None
        if unused and "batch.global_size" in config.given and global_size != start:
            problem = (
                f"batch.global_size={global_size} and batch.schedule={batch.schedule}, which begins with {start} and "
                "says itself what follows, contradict each other"
            )
            raise UserError(problem, "leave batch.global_size out", "batch.global_size", global_size)
        global_size = start
    # Solved in the unit that was asked in, so that an error's numbers are, too; the granule is then a sample.
    label = f"batch.schedule={batch.schedule}: a first size of " if batch.schedule else "batch.global_size="
    cut = solve(
        world,
        global_size=_whole(config, label, global_size),
        per_gpu=_whole(config, "batch.per_gpu=", batch.per_gpu),
        accumulation=batch.accumulation,
        granule=per_sample * (config.batchnorm.ghost_size or 1),
        even=batch.even,
        bitwise=config.numerics == "bitwise",
    )
    first = cut.global_size // per_sample
    # per_gpu bounds every later segment, too; an accumulation that was given without it stays what it is.
    if batch.per_gpu is None:
        return Sizes(first, None, cut.accumulation)
    return Sizes(first, batch.per_gpu // per_sample, None)


def asked(config: RunConfig, train_samples: int | None) -> int | None:
    """Return the global batch that is asked for, in ``batch.unit``; None where it follows from the other sizes.

    Raises:
        UserError: it isn't known, or follows the number of processes though numerics are bitwise.
    """
    if not global_size_rules(config):
        if config.numerics == "bitwise":
            problem = (
                f"numerics=bitwise: batch.per_gpu={config.batch.per_gpu} and "
                f"batch.accumulation={config.batch.accumulation} make another global batch on another number of "
                "processes"
            )
            raise UserError(problem, "give batch.global_size, or leave batch.accumulation out", "numerics", "bitwise")
        return None
    if config.batch.global_size != "all":
        return config.batch.global_size
    if train_samples is None:
        problem = "batch.global_size=all needs the number of training samples"
        fix = "state it as task.train_samples=N (plan.open_data=true opens the data)"
        raise UserError(problem, fix, "batch.global_size", "all")
    return train_samples * size_of_a_sample(config)


def size_of_a_sample(config: RunConfig) -> int:
    """Return how many units one sample counts: 1, or its tokens with ``batch.unit=tokens``."""
    if config.batch.unit == "samples":
        return 1
    if config.task.units_per_sample is None:
        problem = f"batch.unit=tokens, but task {config.task.name} has no fixed number of tokens per sample"
        fix = "state it as task.units_per_sample=N, or use batch.unit=samples"
        raise UserError(problem, fix, "batch.unit", "tokens")
    return config.task.units_per_sample


def in_samples(config: RunConfig, label: str, size: int) -> int:
    """Return a size that was given in ``batch.unit``.

    Args:
        label: text before the size in an error, beginning with its key: ``lr.base_batch=``.
    """
    return (_whole(config, label, size) or 0) // size_of_a_sample(config)


def evaluation_batch(config: RunConfig, plan: Plan, limit: int | None = None) -> int:
    """Return the most samples per forward of an evaluation.

    Args:
        limit: the most samples since memory ran out.

    Raises:
        UserError: ``evaluate.per_gpu`` isn't a whole number of samples.
    """
    given = config.evaluate.per_gpu
    most = plan.cut.per_gpu if given is None else in_samples(config, "evaluate.per_gpu=", given)
    return min(most, limit or most)


def _whole(config: RunConfig, label: str, size: int | None) -> int | None:
    """Return ``size`` if it is a whole number of samples, else raise UserError."""
    per_sample = size_of_a_sample(config)
    if size is not None and size % per_sample:
        near = [whole * per_sample for whole in (size // per_sample, size // per_sample + 1) if whole]
        problem = f"{label}{size} tokens isn't a whole number of samples of {per_sample} tokens"
        raise UserError(problem, f"nearest: {' or '.join(map(str, near))}", label.partition("=")[0], size)
    return size
