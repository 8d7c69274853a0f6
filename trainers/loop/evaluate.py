"""Evaluate a model over all ranks: every sample counts exactly once, and sums are added up before the division."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.stopping import refuse_unnameable
from isobatch.trainers.checkpoints.weights import listed
from isobatch.trainers.data.fetch import to_device
from isobatch.trainers.data.validation import Validation
from isobatch.trainers.model.modes import in_eval_mode
from isobatch.trainers.model.precision import autocast
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.signals import Stop
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task, Totals

if TYPE_CHECKING:
    from isobatch.trainers.engines.engine import Engine


@dataclass(slots=True)
class Evaluator:
    """Evaluate ``model`` on the rows of ``data``; each rank evaluates a contiguous share.

    Attributes:
        stream: keys the random numbers of a forward and of the model's dropout layers.
        per_gpu: the most samples per forward.
        precision: the precision of the forward.
        engine: calls the model; None calls it directly.
        stop: all ranks stop evaluating if any rank is asked to stop.
        watch: records each forward, and its size if it fails.
        patient: returns a context in which the task's ``summarise`` may take any time.
        last: evaluate at the end of the run.
    """

    task: Task
    model: nn.Module
    data: Validation
    world: World
    stream: Stream
    per_gpu: int
    precision: str = "fp32"
    engine: Engine | None = None
    stop: Stop = field(default_factory=Stop)
    watch: Watch = field(default_factory=Watch)
    patient: Callable[[], AbstractContextManager[None]] = nullcontext
    last: bool = True

    def __call__(self) -> dict[str, float] | None:
        """Return the values by name, the same on all ranks; None on all ranks if any rank was asked to stop."""
        own, longest = self._share()
        for buffer in self.model.buffers():
            self.world.share(buffer)  # checkpoints hold the running statistics of rank 0, so evaluate these
        reached = replace(self.watch.reached, per_gpu=min(self.per_gpu, longest), granule=1, fixed=False)
        with self.watch.tracking(lambda: reached), evaluating(self.model, self.stream):
            totals = self._totals(own, longest)
        found = _over_ranks(None if self.stop.wanted else totals, self.world)
        if found is None:
            return None
        if not self.task.has("summarise"):
            return summarise(self.task, found)
        with self.patient():
            values = summarise(self.task, found)
            self.world.gather("")  # stay patient until all ranks are done
        return values

    def of_run(self) -> dict[str, float] | None:
        """Return the values of the trained weights, and of their moving average if there is one."""
        assert self.engine
        engine = self.engine

        def weights() -> Iterator[tuple[str, AbstractContextManager[None]]]:
            yield "val", engine.eval_weights()
            if engine.average:
                yield "ema", engine.average.swapped()

        return self.of_weights(weights())

    def of_weights(self, weights: Iterable[tuple[str, AbstractContextManager[None]]]) -> dict[str, float] | None:
        """Evaluate in each context and return all values as ``<kind>/<name>``, such as ``val/loss`` and ``ema/loss``.

        Return None on all ranks if any rank was asked to stop.
        """
        found: dict[str, float] = {}
        for kind, weights_in_use in weights:
            with weights_in_use:
                values = self()
            if values is None:
                return None
            found |= {f"{kind}/{name}": value for name, value in values.items()}
        return found

    def chunk(self, start: int, stop: int) -> Totals:
        """Return sums and counts of one forward over the evaluated rows [start, stop).

        With ``engine.lockstep``, all ranks have to call this equally often.
        """
        fetched = self.data[start, stop]
        batch = to_device(fetched.batch, self.world.device)
        work: Callable[[], Totals] = partial(measure, self.task, self.model, batch)
        with self.stream.evaluating(self.data.rows[start:stop]), autocast(self.precision, self.world.device):
            if fetched.unkeyed:
                self.stream.tell(fetched.unkeyed)
            totals = self.engine.call(work) if self.engine else work()
        self.watch.beat()
        return totals

    def _totals(self, own: range, longest: int) -> Totals:
        """Return the totals of this rank; stop early if asked to."""
        totals: Totals = {}
        lockstep = self.engine is not None and self.engine.lockstep
        for start in range(own.start, own.start + longest, self.per_gpu):
            wanted = self.stop.wanted is not None
            if self.world.any(wanted) if lockstep else wanted:
                break
            stop = min(start + self.per_gpu, own.stop)
            if start < stop:
                add(totals, self.chunk(start, stop))
            elif lockstep:
                self.chunk(0, 1)  # a stand-in, to run as many forwards as the other ranks
            else:
                break
        return totals

    def _share(self) -> tuple[range, int]:
        """Return this rank's share of the rows, and the size of the largest share, which is rank 0's."""
        share, more = divmod(len(self.data.rows), self.world.size)
        rank = self.world.rank
        first = rank * share + min(rank, more)
        return range(first, first + share + (rank < more)), share + (more > 0)


@contextmanager
def evaluating(model: nn.Module, stream: Stream) -> Iterator[None]:
    """Put ``model`` in eval mode, without gradients; restore modes and buffers afterwards."""
    buffers, changed = {name: buffer.clone() for name, buffer in model.named_buffers()}, []
    with in_eval_mode(model), torch.no_grad():
        yield
        for name, buffer in model.named_buffers():
            before = buffers.get(name)
            if before is None or before.shape != buffer.shape:  # a cache that has grown, to be kept
                continue
            if not torch.equal(before, buffer):
                buffer.copy_(before)
                changed.append(name)
        if changed:
            stream.tell_of_evaluation(f"evaluate changes {listed(changed)} of the model, restored afterwards")


def measure(task: Task, model: nn.Module, batch: Any) -> Totals:
    """Return the task's {name: (sum, count)} of one batch. Raise UserError if ``evaluate`` returns anything else."""
    result = task.evaluate(model, batch)
    pairs = isinstance(result, dict) and all(isinstance(v, tuple) and len(v) == 2 for v in result.values())
    if not pairs:
        raise UserError(f"task.evaluate has to return {{name: (sum, count)}}; it returned {result!r:.200}")
    for name in result:
        refuse_unnameable(name, "task.evaluate")
    return {name: _numbers(name, pair) for name, pair in result.items()}


def add(totals: Totals, more: Totals) -> None:
    """Add the sums and counts of ``more`` to ``totals``."""
    for name, (value, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = before[0] + value, before[1] + count


def summarise(task: Task, totals: Totals) -> dict[str, float]:
    """Return each sum divided by its count, and the task's ``summarise``. Raise UserError if that isn't a dict."""
    ratios = {name: value / count if count else float("nan") for name, (value, count) in totals.items()}
    made = task.summarise(totals)
    if not isinstance(made, dict):
        raise UserError(f"task.summarise has to return {{name: value}}; it returned {made!r:.200}")
    for name in made:
        refuse_unnameable(name, "task.summarise")
    return {**ratios, **{name: float(value) for name, value in made.items()}}


def _numbers(name: str, pair: Any) -> tuple[float, float]:
    with suppress(TypeError, ValueError):
        value, count = (one for one in pair if not isinstance(one, Tensor) or one.numel() == 1)
        return float(value), float(count)
    raise UserError(f"task.evaluate has to return a sum and a count, both numbers; {name} has {pair!r:.100}")


def _over_ranks(totals: Totals | None, world: World) -> Totals | None:
    """Sum the totals of all ranks; return None if any rank has None."""
    if world.size == 1:
        return totals
    found = [json.loads(names) for names in world.gather(json.dumps(None if totals is None else list(totals)))]
    if totals is None or None in found:
        return None
    names = dict.fromkeys(name for names in found for name in names)
    flat = torch.tensor([totals.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64, device=world.device)
    world.sum(flat)
    return {name: (value, count) for name, (value, count) in zip(names, flat.tolist(), strict=True)}
