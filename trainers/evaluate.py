"""Evaluation, exact over ranks: every sample once, sums added up, then divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from trainers.average import Average
from trainers.enter import refuse_unless_same
from trainers.loader import to_device
from trainers.precision import autocast
from trainers.rundir import Refused
from trainers.stop import Stop
from trainers.tasks import Task, check_map_style
from trainers.world import World

Totals = dict[str, tuple[float, float]]
Evaluate = Callable[[], dict[str, float] | None]


def make_evaluate(
    task: Task,
    model: nn.Module,
    world: World,
    per_gpu: int,
    stop: Stop | None = None,
    beat: Callable[[], None] = lambda: None,
    precision: str = "fp32",
    call: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    lockstep: bool = False,
) -> Evaluate | None:
    """A function that evaluates ``model`` on the task's validation data; None where it has none.

    It gives the same values on all ranks; None, on all of them, where some rank was asked to stop meanwhile: that rank
    leaves off at once.

    Args:
        per_gpu: samples per forward.
        beat: called after each forward.
        precision: what it computes in.
        call: what calls the model; with ``lockstep``, all ranks have to do so equally often.

    Raises:
        Refused: ``val_data()`` isn't a map-style dataset or is empty.
    """
    stop = stop or Stop()
    data = task.val_data() if hasattr(task, "val_data") else None
    samples = -1 if data is None else check_map_style(data, "val_data()")
    refuse_unless_same(world, "the number of samples that val_data() has (-1: there is none)", samples)
    if data is None:
        return None
    if samples == 0:
        raise Refused("val_data() has 0 samples; return None where there is nothing to evaluate on")
    # A contiguous share for each rank, the larger ones first: rank 0 always has at least one sample.
    share, more = divmod(samples, world.size)
    first = world.rank * share + min(world.rank, more)
    mine, longest = range(first, first + share + (world.rank < more)), share + (more > 0)

    def evaluate() -> dict[str, float] | None:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        for buffer in model.buffers():
            world.share(buffer)  # what is evaluated is what is kept: rank 0's running statistics
        totals: Totals = {}
        with torch.no_grad():
            for start in range(mine.start, mine.start + longest, per_gpu):
                if world.any(stop.wanted is not None) if lockstep else stop.wanted:
                    break
                rows = range(start, min(start + per_gpu, mine.stop))
                if not (rows or lockstep):
                    break
                batch = to_device(_batch(data, rows or range(1), task), world.device)
                with autocast(precision, world.device):
                    measured = call(partial(_measure, task, model, batch))
                for name, (value, count) in measured if rows else ():
                    before = totals.get(name, (0.0, 0.0))
                    totals[name] = before[0] + _number(name, value), before[1] + _number(name, count)
                beat()
        for module, training in modes:
            module.training = training
        found = _over_ranks(None if stop.wanted else totals, world)
        return None if found is None else _summarise(task, found)

    return evaluate


def with_average(evaluate: Evaluate | None, average: Average | None) -> Evaluate | None:
    """The values of ``evaluate`` as ``val/<name>``, and those of the weights' average as ``ema/<name>``."""
    if evaluate is None:
        return None

    def both() -> dict[str, float] | None:
        if (values := evaluate()) is None:
            return None
        found = {f"val/{name}": value for name, value in values.items()}
        if average:
            with average.swapped():
                values = evaluate()
            if values is None:
                return None
            found |= {f"ema/{name}": value for name, value in values.items()}
        return found

    return both


def _batch(data: Any, rows: range, task: Task) -> Any:
    if type(data) is TensorDataset and not hasattr(task, "collate"):
        return data[rows.start : rows.stop]
    samples = data.__getitems__(list(rows)) if hasattr(data, "__getitems__") else [data[row] for row in rows]
    return getattr(task, "collate", default_collate)(samples)


def _measure(task: Task, model: nn.Module, batch: Any) -> Any:
    """Pairs of name and (sum, count) of one batch: the task's ``evaluate``, else its loss."""
    if not hasattr(task, "evaluate"):
        return [("loss", task.loss(model, batch))]
    result = task.evaluate(model, batch)
    pairs = isinstance(result, dict) and all(isinstance(v, tuple) and len(v) == 2 for v in result.values())
    if not pairs:
        raise Refused(f"task.evaluate has to return {{name: (sum, count)}}; it returned {result!r:.200}")
    return result.items()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Refused(f"task.evaluate has to return sums and counts, numbers both; {name} has {value!r:.100}") from None


def _over_ranks(totals: Totals | None, world: World) -> Totals | None:
    """The totals of all ranks, added up; None where some rank has None."""
    if world.size == 1:
        return totals
    found = [json.loads(names) for names in world.gather(json.dumps(None if totals is None else list(totals)))]
    if totals is None or None in found:
        return None
    names = dict.fromkeys(name for names in found for name in names)
    flat = torch.tensor([totals.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64, device=world.device)
    world.sum(flat)
    return {name: (value, count) for name, (value, count) in zip(names, flat.tolist(), strict=True)}


def _summarise(task: Task, totals: Totals) -> dict[str, float]:
    """The task's ``summarise`` over all totals; without one, each sum over its count."""
    ratios = {name: value / count if count else float("nan") for name, (value, count) in totals.items()}
    if not hasattr(task, "summarise"):
        return ratios
    made = task.summarise(totals)
    if not isinstance(made, dict):
        raise Refused(f"task.summarise has to return {{name: value}}; it returned {made!r:.200}")
    return {**ratios, **{name: float(value) for name, value in made.items()}}
