"""Try a task's contract on a few samples before step 1: its loss is a sum, and nothing in it counts calls.

A loss of n samples that isn't the sum over their halves changes with the cut, and a mean is wrong by a factor. Both
are found here, in some forwards of the bare model in fp32, of which nothing remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from isobatch.scaling.geometry import Cut, counted
from isobatch.trainers.engines.reducer import norm_of
from isobatch.trainers.ranks.failure import is_oom
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.trial.halves import Draw, Halves, judge
from isobatch.trainers.trial.sandbox import Sandbox, exact_fp32

DRAWS = 4  # batches; a single one can be balanced by luck
LEAST, GRANULES = 4, 16  # of a batch, where a micro-batch has as many; granules are samples that stay together


@dataclass(frozen=True, slots=True)
class Found:
    """Hold what a trial found.

    Attributes:
        rejected: why the task can't be trained; empty where it can.
        counters: numbers that change with every call, and so depend on the number of ranks too.
        depends: what else makes the run depend on its cut.
        skipped: why something couldn't be tried.
    """

    rejected: str = ""
    counters: list[str] = field(default_factory=list)
    depends: list[str] = field(default_factory=list)
    skipped: str = ""


def batches_of(cut: Cut, train_samples: int) -> list[tuple[int, int, int]]:
    """Return start, middle and stop of the batches to try, in whole granules; none where a batch would have one alone.

    A batch is a quarter of a micro-batch, so that all of them together cost as much as a few steps.
    """
    most = min(cut.per_gpu, train_samples) // cut.granule
    granules = min(most, max(LEAST, min(GRANULES, most // DRAWS)))
    if granules < 2:
        return []
    samples, half = granules * cut.granule, granules // 2 * cut.granule
    return [(start, start + half, start + samples) for start in range(0, DRAWS * samples, samples)]


def try_loss(sandbox: Sandbox, batches: Sequence[Halves], to_training_mode: Callable[[], Any]) -> Found:
    """Call ``task.loss`` on whole batches and on their halves, with dropout and batch statistics switched off.

    Args:
        batches: at least one.
        to_training_mode: puts the model into the modes in which it is trained.

    Raises:
        UserError: the loss returns something else than the contract says.
        Exception: the loss of a whole batch fails.
    """
    loss, first = partial(sandbox.task.loss, sandbox.model), batches[0]
    with sandbox, exact_fp32():
        to_training_mode()
        switch_off(sandbox.model)
        moved = sandbox.moved_by(lambda: sandbox.call(loss, first.whole, first.start))
        counters = [
            f"{name} changes with every call of the forward or the loss, and the cut says how many calls a step has"
            for name in moved
        ]
        try:
            draws = _draws(sandbox, [batch for batch in batches if not batch.unkeyed])
        except _HalfFails as failure:
            return Found("", counters, [str(failure)])
    verdict, shown = judge(draws, noisy=sandbox.drew or sandbox.narrow)
    if verdict == "mean":
        return Found(
            f"task.loss returns a mean, not a sum: {shown}; return (sum, number of units), with reduction='sum', or "
            "one loss per sample, with reduction='none'"
        )
    depends = [
        f"task.loss isn't a sum over samples: {shown}; negatives or statistics taken from the batch, the hardest of "
        "its samples, or a penalty added once per call do that"
    ]
    return Found("", counters, depends if verdict == "coupled" else [])


class _HalfFails(Exception):
    """The loss works for a whole batch and not for half of it."""


def _draws(sandbox: Sandbox, batches: Sequence[Halves]) -> list[Draw]:
    """Measure in training mode; where random numbers are drawn there, and not in eval mode, measure in eval mode."""
    sandbox.drew = False
    draws = [_draw(sandbox, batch) for batch in batches]
    if sandbox.drew:  # as functional dropout does
        sandbox.drew = False
        sandbox.model.eval()
        with suppress(Exception):  # the model may fail there
            quiet = [_draw(sandbox, batch) for batch in batches]
            if not sandbox.drew:
                return quiet
        sandbox.drew = True
    return draws


def _draw(sandbox: Sandbox, batch: Halves) -> Draw:
    parameters = [parameter for parameter in sandbox.model.parameters() if parameter.requires_grad]
    samples = batch.samples
    whole, gradient = _measure(sandbox, batch.whole, batch.start, samples[0], parameters)
    try:
        first, of_first = _measure(sandbox, batch.first, batch.start, samples[1], parameters)
        second, of_second = _measure(sandbox, batch.second, batch.middle, samples[2], parameters)
    except Exception as error:
        if is_oom(error):
            raise
        raise _HalfFails(
            f"task.loss works for {counted(samples[0], 'sample')} and fails for {samples[1]} or {samples[2]} of "
            f"them ({type(error).__name__}: {error})"
        ) from error
    size = norm_of(of_first) + norm_of(of_second)
    for one, *halves in zip(gradient, of_first, of_second, strict=True):
        one -= sum(halves)
    return Draw(whole, first, second, samples, float(norm_of(gradient) / size) if size else 0.0)


def _measure(
    sandbox: Sandbox, batch: Any, start: int, samples: int, parameters: list[nn.Parameter]
) -> tuple[tuple[float, float], list[Tensor]]:
    """Return the loss with its units, and the gradient: zeros for a parameter that has none."""
    sandbox.reset()
    switch_off(sandbox.model)
    loss, units = sandbox.call(lambda inputs: checked(sandbox.task.loss(sandbox.model, inputs), samples), batch, start)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, gradient, strict=True)]
    sandbox.narrow = sandbox.narrow or any(one.dtype.itemsize < 4 for one in dense)
    return (float(loss.detach()), float(units)), dense


def switch_off(model: nn.Module) -> None:
    """Switch off what makes the loss of a sample random or couples samples by design, and is reported as such.

    That is dropout, and normalisation by statistics of the batch.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            if module.running_mean is None:  # else it takes statistics of the batch in eval mode, too
                like = next(model.parameters())
                module.running_mean = like.new_zeros(module.num_features)
                module.running_var = like.new_ones(module.num_features)
        elif isinstance(module, _DropoutNd) or "drop" in type(module).__name__.lower():
            module.eval()
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
