"""The sizes of a batch that a config asks for, in samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isobatch.conf.identity import global_size_rules
from isobatch.scaling.geometry import solve

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def first_size(config: RunConfig, world: int, train_samples: int | None) -> tuple[int, int | None, int | None]:
    """The first stage's global batch; then the per-GPU batch, or the accumulation, from which Plan solves all cuts.

    All sizes leave here in samples.
    """
    batch, per_sample = config.batch, size_of_a_sample(config)
    global_size = asked(config, train_samples)
    if batch.schedule and (start := batch.schedule.start):
        unused = batch.schedule.kind != "ramp" or batch.schedule.last is not None
        if unused and "batch.global_size" in config.given and global_size != start:
            raise ValueError(
                f"batch.global_size={global_size} and batch.schedule={batch.schedule}, which begins with {start} and "
                "says itself what follows, contradict each other: leave batch.global_size out"
            )
        global_size = start
    # Solved in the unit that was asked in, so that a refusal's numbers are, too; what can't be parted is then a sample.
    said = f"batch.schedule={batch.schedule}: a first size of " if batch.schedule else "batch.global_size="
    cut = solve(
        world,
        global_size=_whole(config, said, global_size),
        per_gpu=_whole(config, "batch.per_gpu=", batch.per_gpu),
        accumulation=batch.accumulation,
        granule=per_sample * (config.batchnorm.ghost_size or 1),
        even=batch.even,
        bitwise=config.numerics == "bitwise",
    )
    first = cut.global_size // per_sample
    # per_gpu bounds every later segment, too; an accumulation that was given without it stays what it is.
    return (first, None, cut.accumulation) if batch.per_gpu is None else (first, batch.per_gpu // per_sample, None)


def asked(config: RunConfig, train_samples: int | None) -> int | None:
    """The global batch that is asked for, in ``batch.unit``; None where it follows from the others.

    Raises:
        ValueError: it isn't known, or follows the number of processes though numerics are bitwise.
    """
    if not global_size_rules(config):
        if config.numerics == "bitwise":
            raise ValueError(
                f"numerics=bitwise: batch.per_gpu={config.batch.per_gpu} and "
                f"batch.accumulation={config.batch.accumulation} make another global batch on another number of "
                "processes: give batch.global_size, or leave batch.accumulation out"
            )
        return None
    if config.batch.global_size != "all":
        return config.batch.global_size
    if train_samples is None:
        raise ValueError(
            "batch.global_size=all needs the number of training samples: state it as task.train_samples=N"
            " (plan.open_data=true opens the data)"
        )
    return train_samples * size_of_a_sample(config)


def size_of_a_sample(config: RunConfig) -> int:
    """What one sample counts in a size: ``batch.unit`` says what sizes are given in."""
    if config.batch.unit == "samples":
        return 1
    if config.task.units_per_sample is None:
        raise ValueError(
            f"batch.unit=tokens, but task {config.task.name} has no fixed number of tokens per sample: state it as "
            "task.units_per_sample=N, or use batch.unit=samples"
        )
    return config.task.units_per_sample


def in_samples(config: RunConfig, said: str, size: int) -> int:
    """A size that was given in ``batch.unit``; ``said`` (``lr.base_batch=``) stands before it in a refusal."""
    return (_whole(config, said, size) or 0) // size_of_a_sample(config)


def _whole(config: RunConfig, said: str, size: int | None) -> int | None:
    """``size``, which has to be a whole number of samples."""
    per_sample = size_of_a_sample(config)
    if size is not None and size % per_sample:
        near = [whole * per_sample for whole in (size // per_sample, size // per_sample + 1) if whole]
        raise ValueError(
            f"{said}{size} tokens isn't a whole number of samples of {per_sample} tokens; nearest: "
            f"{' or '.join(map(str, near))}"
        )
    return size
