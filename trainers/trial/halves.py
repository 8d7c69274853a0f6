"""Fetch a few batches of a task's training data, each as a whole and in two halves, for the trial of its contract."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isobatch.scaling.order import indices
from isobatch.trainers.data.fetch import Fetch, fetches_many
from isobatch.trainers.data.fingerprint import digests, fetched

TWICE = 8  # samples, at most, that are fetched twice: one that is only flipped now and then may be equal by chance
OWN = "draws from a generator of its own, or from a clock: use the default generators of torch, numpy or Python"


@dataclass(frozen=True, slots=True)
class Halves:
    """Hold the same samples, collated as one batch and as two.

    Attributes:
        start, middle, stop: their positions; [start, middle) is the first half.
        whole, first, second: the batches.
        unkeyed: collate drew random numbers, so the batches may differ in more than their samples.
    """

    start: int
    middle: int
    stop: int
    whole: Any
    first: Any
    second: Any
    unkeyed: bool


def halves(fetch: Fetch, start: int, middle: int, stop: int) -> Halves:
    """Fetch the samples at [start, stop) once, so that a generator of the dataset's own makes no difference."""
    samples, _ = fetch.samples(start, indices(fetch.seed, fetch.length, start, stop).tolist())
    whole, unkeyed = fetch.collated(start, _again(samples))
    first, _ = fetch.collated(start, _again(samples[: middle - start]))
    second, _ = fetch.collated(middle, samples[middle - start :])
    return Halves(start, middle, stop, whole, first, second, unkeyed is not None)


def _again(samples: list[Any]) -> list[Any]:
    """Copy samples if they can be copied: collate may change them in place."""
    try:
        return copy.deepcopy(samples)
    except Exception:
        return samples


def own_generators(fetch: Fetch) -> list[str]:
    """Fetch a few samples twice under the same keys, and say what in fetching them isn't a function of these."""
    rows = indices(fetch.seed, fetch.length, 0, min(TWICE, fetch.length)).tolist()
    samples, again = (list(fetched(fetch.data, fetch.seed, rows)) for _ in range(2))
    if differ(samples, again):
        return [f"the dataset's {'__getitems__' if fetches_many(fetch.data) else '[index]'} {OWN}, or augment()"]
    if fetch.augment:
        samples, again = (fetch.samples(0, rows)[0] for _ in range(2))
        if differ(samples, again):
            return [f"augment() {OWN}, or the generator that it gets"]
    one, other = ([fetch.collated(0, _again([sample]))[0] for sample in samples] for _ in range(2))
    return [f"collate() {OWN}"] if differ(one, other) else []


def differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Return whether samples, or batches, differ in what they hold."""
    return list(map(digests, one)) != list(map(digests, other))
