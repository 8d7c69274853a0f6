"""Measure the largest per-GPU batch that fits in memory: a few steps on all ranks, on copies of a large sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isobatch.scaling.plan import Step
from isobatch.scaling.tuning.estimated import from_json as estimate_from
from isobatch.scaling.tuning.estimated import what_helps
from isobatch.scaling.tuning.footprint import Footprint, Pass, curve
from isobatch.scaling.tuning.memory import Bounds, Limit, Memory, Predict, Probe, concluded, from_json, next_size, told
from isobatch.trainers.data.fetch import to_device
from isobatch.trainers.engines.step_report import Note, Requests
from isobatch.trainers.model.randomness import generators_kept
from isobatch.trainers.ranks.failure import Reached, is_lost, is_oom
from isobatch.trainers.ranks.internals import BatchNorm
from isobatch.trainers.ranks.world import World
from isobatch.trainers.trial.untouched import Copies
from isobatch.trainers.tuning.bench import Bench, Interrupted, Trial
from isobatch.trainers.tuning.estimate import Subject, trace, traced_from
from isobatch.trainers.tuning.journal import Journal
from isobatch.trainers.tuning.meter import Meter, oom_kills
from isobatch.trainers.tuning.outlook import estimated
from isobatch.trainers.tuning.samples import LargeBatches
from isobatch.trainers.tuning.stored import on_rank_0

SKIPPED = 30  # steps that may be skipped before one isn't: fp16 begins with a loss scale that is too high


def measure(bench: Bench, cap: int | None = None, journal: Journal | None = None) -> Memory:
    """Return the largest per-GPU batch that fits, the same on all ranks.

    Args:
        cap: the most samples of a rank in a step; None: its share of the data.
        journal: where a size is noted before it is run, for the next start if the process ends.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    task, world = bench.opened.task, bench.session.world
    with generators_kept(world.device), Copies(task.own, torch.nn.Module(), world.device).held():
        return Probing(bench, cap or share_of(bench), journal or Journal(None, {})).search()


def measure_noted(bench: Bench, folder: Path, conditions: Mapping[str, Any], cap: int | None = None) -> Memory:
    """Measure, and note each size in ``folder`` before it is run, so that the next start continues after a kill.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    world = bench.session.world
    journal = Journal(folder, conditions, writes=world.rank == 0)
    kills = kernel_kills(world)
    on_rank_0(world, folder, lambda: journal.read(kills))
    journal.load(world.agree(journal.text()))
    try:
        found = measure(bench, cap, journal)
    except Interrupted:
        on_rank_0(world, folder, journal.close)
        raise
    on_rank_0(world, folder, journal.close)
    return found


def usable(stored: dict[str, Any] | None, cap: int) -> Memory | None:
    """Return a stored result, if it is valid and holds for ``cap``: its own cap may have been smaller."""
    try:
        found = None if stored is None else from_json(stored)
    except ValueError:
        return None
    return None if found is None or (found.outcome == "cap" and found.per_gpu < cap) else found


def share_of(bench: Bench) -> int:
    """Return the most samples of a rank in a step: its share of the data, in whole granules."""
    granule = bench.opened.plan.granule
    return max(1, -(-len(bench.opened.data) // bench.session.world.size) // granule) * granule


def kernel_kills(world: World) -> dict[str, int]:
    """Return how many processes the kernel has killed for lack of memory, on the machines of all ranks."""
    found: dict[str, int] = {}
    for text in world.gather(json.dumps(oom_kills())):
        found |= json.loads(text)
    return found


class Probing:
    """Run steps of growing size.

    Args:
        cap: the most samples of a rank in a step, which is then a single pass.
    """

    def __init__(self, bench: Bench, cap: int, journal: Journal) -> None:
        self._bench, self._cap, self._journal = bench, cap, journal
        self._world, cluster = bench.session.world, bench.config.cluster
        with bench.session.watch.excused():  # fetching samples may be slow
            self._batches = LargeBatches(bench.opened.data, bench.opened.task, bench.config.seed)
        self._meter = Meter(self._world.device, self._world.local_size, cluster.memory_gb)
        self._least = 1  # 2 once the model is known to have a BatchNorm layer

    def search(self) -> Memory:
        """Probe sizes until the largest is found."""
        bench, journal = self._bench, self._journal
        lasting = 0.0
        bounds, limit = self._bounds(lasting)
        probes = journal.probes
        prior: Predict | None = None
        while (size := next_size(probes, bounds, prior)) is not None:
            if probes and prior is None and size < self._cap:
                prior = self._prior()
                size = next_size(probes, bounds, prior) or size
            bench.refuse_stop()
            self._note(partial(journal.begin, size, kernel_kills(self._world)))
            reached = Reached(0, 0, size, bounds.granule, probe=True)
            with bench.session.watch.tracking(partial(replace, reached)):
                peak, lasting = self._run(size, lasting)
            self._note(partial(journal.end, Probe(size, peak)))
            bounds, limit = self._bounds(lasting)
            shown = "doesn't fit" if peak is None else f"{peak / 1e9:.3g} GB"
            bench.say(f"{size:,} samples: {shown}")
        found = concluded(probes, bounds, limit, bench.config.tune.margin, prior)
        return found if found.per_gpu else replace(found, outlook=self._outlook(limit))

    def _note(self, change: Callable[[], None]) -> None:
        """Change the journal on all ranks. Raises UserError on all ranks if it can't be written."""
        if self._world.rank:
            change()
        on_rank_0(self._world, self._journal.file or Path(), change)

    def _bounds(self, lasting: float) -> tuple[Bounds, Limit]:
        """Return the bounds of sizes, by the least limit of all ranks."""
        found = [Limit(**json.loads(text)) for text in self._world.gather(json.dumps(asdict(self._meter.limit())))]
        limit, plan = min(found, key=lambda one: one.bytes), self._bench.opened.plan
        least = min(self._cap, max(self._least, plan.granule))
        first = min(self._cap, max(2, plan.granule))
        room = limit.bytes * (1 - self._bench.config.tune.margin)
        return Bounds(room, least, first, self._cap, plan.granule, lasting, self._permitted), limit

    def _permitted(self, size: int) -> bool:
        """Return whether the run's plan can have this per-GPU batch; with ``batch.even`` not each size can be."""
        plan = self._bench.opened.plan
        if not plan.even:
            return True
        granules, most = plan.cut.global_size // plan.granule, size // plan.granule
        passes = -(-granules // (plan.world * most))
        return granules % (plan.world * passes) == 0

    def _run(self, size: int, lasting: float) -> tuple[int | None, float]:
        """Return the largest peak of all ranks in a step, and the least that lasts; None: memory ran out."""
        bench = self._bench
        try:
            with bench.trial(bench.plan(size * self._world.size, size)) as trial:
                if any(isinstance(module, BatchNorm) for module in trial.model.modules()):
                    self._least = 2
                one = OneSize(trial, self._meter, self._batches, size, single=size >= self._cap)
                peak = one.peak()
                after = bench.least(one.lasting())
        except OutOfMemory:
            return None, lasting
        except Exception as error:
            if not is_oom(error):
                if not is_lost(error):
                    self._journal.drop()
                raise
            if self._world.size > 1:  # the other ranks wait for this one; the next start knows the size
                self._journal.ran_out()
                raise
            return None, lasting
        return int(bench.most(peak)), min(lasting or after, after)

    def _prior(self) -> Predict | None:
        """Return the estimated peak by size, traced on rank 0."""
        found = self._of_rank_0(lambda subject, process: asdict(trace(subject, process)))
        if found is None:
            return None
        passes = tuple(Pass(**one) for one in found.pop("passes"))
        engine, ranks = self._bench.opened.plan.engine, self._world.size
        known = curve(Footprint(**found, passes=passes), engine, ranks, accumulates=True)
        return known.peak if known else None

    def _outlook(self, limit: Limit) -> dict[str, Any] | None:
        """Return what other settings would need, as JSON values."""
        plan, room = self._bench.opened.plan, (float(limit.bytes), limit.source)
        return self._of_rank_0(lambda subject, process: estimated(subject, plan, room, process).as_json())

    def _of_rank_0(self, work: Callable[[Subject, int], dict[str, Any]]) -> dict[str, Any] | None:
        """Return on all ranks what ``work`` returns on rank 0 for the run's subject, and for the bytes of its process.

        Return None if the user's code can't run on fake tensors.
        """
        bench, world = self._bench, self._world
        config, plan, on_gpu = bench.config, bench.opened.plan, world.device.type != "cpu"
        found = None
        with bench.session.watch.excused():
            if world.rank == 0:
                least = traced_from(self._batches.bytes, plan.granule)
                subject = Subject(config, bench.opened.task, plan.peak, self._batches, least, on_gpu)
                with suppress(Exception):  # whatever the user's code does with fake tensors
                    found = work(subject, 0 if on_gpu else self._meter.now())
            return bench.agree(found)  # type: ignore[no-any-return]


class OutOfMemory(Exception):
    """Memory ran out on a rank; raised on all ranks."""


class OneSize:
    """Take steps of one size, and measure them."""

    def __init__(self, trial: Trial, meter: Meter, batches: LargeBatches, size: int, *, single: bool) -> None:
        self._trial, self._meter, self._size, self._single = trial, meter, size, single
        self._bench, self._engine = trial.bench, trial.engine
        self._world = trial.bench.session.world
        self._apart = self._world.size > 1 and not trial.engine.lockstep
        self._batch = self._guarded(lambda: to_device(batches(size), self._world.device))

    def peak(self) -> int:
        """Return the peak of a step, after a first one, which makes the optimizer's state.

        Raises:
            OutOfMemory: on all ranks.
        """
        passes = 1 if self._single else 2
        if self._apart:
            self._pass_apart()
        for _ in range(SKIPPED):
            if not self._step(passes):
                break
        self._meter.start()
        self._step(passes)
        return self._meter.peak()

    def lasting(self) -> int:
        """Return the bytes in use between two steps, without the batch."""
        self._batch = None
        self._meter.start()
        return self._meter.now()

    def _pass_apart(self) -> None:
        """Run a pass without messages, so that a rank whose memory runs out doesn't leave the others waiting."""
        step = self._of(passes=2)

        def work() -> None:
            with self._engine.micro(step.cut, last=False):
                self._forward_and_backward(step, last=False)
            self._engine.abandon()

        self._guarded(work)

    def _step(self, passes: int) -> bool:
        """Take a step; return whether it was skipped. Raises OutOfMemory."""
        step = self._of(passes)
        skipped = False

        def work() -> None:
            nonlocal skipped
            for index in range(passes):
                with self._engine.micro(step.cut, last=index == passes - 1):
                    self._forward_and_backward(step, last=index == passes - 1)
                self._bench.session.watch.beat()
            total = self._engine.total(step.expected_units)
            if float(total.requests.stop):
                raise Interrupted
            scale = total.scale(step.expected_units)
            skipped = self._engine.update(scale, self._bench.config.clip_norm, step.recipe).skipped

        if self._world.size > 1:
            work()  # a rank whose memory runs out ends, and the restart knows the size by the journal
        else:
            self._guarded(work)
        return skipped

    def _forward_and_backward(self, step: Step, *, last: bool) -> None:
        stream = self._bench.stream
        stream.start(0, self._size)
        loss, units, measures = self._engine.loss(self._batch, self._size)
        stream.stop()
        requests = Requests(stop=self._bench.session.stop.wanted is not None) if last else Requests()
        expected = step.expected_units * self._size // step.cut.global_size
        self._engine.backward(loss / step.expected_units, Note(loss, units, expected, measures, 0.0, requests))

    def _of(self, passes: int) -> Step:
        """Return a step of this size."""
        step = self._bench.plan(self._size * self._world.size * passes, self._size).step_at(0)
        assert step is not None
        return step

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Return the result of ``work``, which sends no messages. Raises OutOfMemory on all ranks."""
        result, ran_out = None, False
        try:
            result = work()
        except Exception as error:
            if not is_oom(error):
                raise
            ran_out = True
        if self._world.any(ran_out):
            raise OutOfMemory
        return result


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the largest per-GPU batch, and with what would help if nothing fits."""
    outlook = found.get("outlook")
    return told(from_json(found)) + (f"; {what_helps(estimate_from(outlook))}" if outlook else "")
