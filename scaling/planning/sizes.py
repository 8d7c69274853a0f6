"""Convert a config's batch sizes to samples."""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.conf.identity import global_size_was_given
from isobatch.conf.schema import RunConfig
from isobatch.scaling.batch_schedule import OF_THE_DATA
from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import solve
from isobatch.scaling.plan import Plan


@dataclass(frozen=True, slots=True)
class Sizes:
    """Hold the first stage's global batch, and the sizes that the cut of every stage is solved from, in samples."""

    global_size: int
    per_gpu: int | None
    accumulation: int | None


def first_sizes(config: RunConfig, world: int, train_samples: int | None) -> Sizes:
    """Return the sizes of the first stage.

    Raises:
        UserError: the sizes contradict each other, aren't known, or aren't whole numbers of samples.
    """
    batch, per_sample = config.batch, size_of_a_sample(config)
    global_size = asked(config, train_samples)
    if batch.schedule and (start := batch.schedule.start):
        unused = batch.schedule.kind != "ramp" or batch.schedule.last is not None
        if unused and "batch.global_size" in config.given and global_size != start:
            problem = (
                f"batch.global_size={global_size} contradicts batch.schedule={batch.schedule}, which starts at {start} "
                "and sets every later size"
            )
            raise UserError(problem, "leave batch.global_size out", "batch.global_size", global_size)
        global_size = start
    # Solve in the user's unit, so that errors use it, too; with tokens, the granule is at least one sample.
    label = f"batch.schedule={batch.schedule}: a first size of " if batch.schedule else "batch.global_size="
    cut = solve(
        world,
        global_size=_whole(config, label, global_size),
        per_gpu=_whole(config, "batch.per_gpu=", batch.given_per_gpu),
        accumulation=batch.accumulation,
        granule=per_sample * (config.batchnorm.ghost_size or 1),
        even=batch.even,
        bitwise=config.numerics == "bitwise",
    )
    first = cut.global_size // per_sample
    # per_gpu bounds every later segment, too; an accumulation given without it applies to every segment.
    if batch.given_per_gpu is None:
        return Sizes(first, None, cut.accumulation)
    return Sizes(first, batch.given_per_gpu // per_sample, None)


def asked(config: RunConfig, train_samples: int | None) -> int | None:
    """Return the requested global batch in ``batch.unit``, or None if it follows from the other sizes.

    Raises:
        UserError: it isn't known, or it depends on the number of processes while numerics are bitwise.
    """
    if not global_size_was_given(config):
        if config.numerics == "bitwise":
            problem = (
                f"numerics=bitwise, but with batch.per_gpu={config.batch.per_gpu} and "
                f"batch.accumulation={config.batch.accumulation} the global batch depends on the number of processes"
            )
            raise UserError(problem, "give batch.global_size, or leave batch.accumulation out", "numerics", "bitwise")
        return None
    if config.batch.global_size != "all":
        return config.batch.global_size
    if train_samples is None:
        problem = "batch.global_size=all needs the number of training samples"
        fix = "give it as task.train_samples=N, or open the data with plan.open_data=true"
        raise UserError(problem, fix, "batch.global_size", "all")
    return train_samples * size_of_a_sample(config)


def size_of_a_sample(config: RunConfig) -> int:
    """Return the units per sample: 1, or its tokens with ``batch.unit=tokens``."""
    if config.batch.unit == "samples":
        return 1
    if config.task.units_per_sample is None:
        problem = f"batch.unit=tokens, but task {config.task.name} has no fixed number of tokens per sample"
        fix = "give it as task.units_per_sample=N, or use batch.unit=samples"
        raise UserError(problem, fix, "batch.unit", "tokens")
    return config.task.units_per_sample


def in_samples(config: RunConfig, label: str, size: int) -> int:
    """Convert a size from ``batch.unit`` to samples.

    Args:
        label: text before the size in an error, starting with its key: ``lr.base_batch=``.
    """
    return (_whole(config, label, size) or 0) // size_of_a_sample(config)


def largest_for_decay(config: RunConfig, train_samples: int | None) -> int | None:
    """Return the largest batch, in samples, of a schedule that grows the batch instead of decaying the LR.

    That is its ``to``, else a tenth of the data; None if that isn't known yet.
    """
    wanted = config.batch.schedule
    assert wanted
    if wanted.last is not None:
        return in_samples(config, f"batch.schedule={wanted}: ", wanted.last)
    return None if train_samples is None else train_samples // OF_THE_DATA


def evaluation_batch(config: RunConfig, plan: Plan, limit: int | None = None) -> int:
    """Return the most samples per forward of an evaluation.

    Args:
        limit: the lower limit after running out of memory, if any.

    Raises:
        UserError: ``evaluate.per_gpu`` isn't a whole number of samples.
    """
    given = config.evaluate.per_gpu
    most = plan.cut.per_gpu if given is None else in_samples(config, "evaluate.per_gpu=", given)
    return min(most, limit or most)


def _whole(config: RunConfig, label: str, size: int | None) -> int | None:
    """Return ``size``, or raise UserError if it isn't a whole number of samples."""
    per_sample = size_of_a_sample(config)
    if size is not None and size % per_sample:
        near = [whole * per_sample for whole in (size // per_sample, size // per_sample + 1) if whole]
        problem = f"{label}{size} tokens isn't a whole number of samples of {per_sample} tokens"
        raise UserError(problem, f"nearest: {' or '.join(map(str, near))}", label.partition("=")[0], size)
    return size
