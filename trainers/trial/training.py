"""Try a task's loss on a few samples before step 1: it has to be a sum over samples, and must not count calls.

A loss that isn't the sum of its halves' losses changes with the cut, and a mean is wrong by a factor. A few forwards of
the bare model in fp32 find both, and leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import Cut, counted
from isobatch.trainers.engines.reducer import norm_of
from isobatch.trainers.ranks.failure import is_oom
from isobatch.trainers.ranks.internals import BatchNorm, Dropout
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.trial.halves import Draw, Halves, judge, judge_totals
from isobatch.trainers.trial.sandbox import Sandbox, exact_fp32

DRAWS = 4  # batches; the halves of a single batch may agree by chance
LEAST, GRANULES = 4, 16  # granules of a batch, if a micro-batch has as many


@dataclass(frozen=True, slots=True)
class Found:
    """Hold the findings of a trial.

    Attributes:
        counters: numbers that change with every call, and so also depend on the number of ranks.
        logged: measures of the loss that depend on the cut.
        depends: other reasons why the run depends on its cut.
        skipped: why a part of the trial was skipped.
        failed: the error with which a call of the task failed.
    """

    counters: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    depends: list[str] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""


def batches_of(cut: Cut, train_samples: int) -> list[tuple[int, int, int]]:
    """Return start, middle and stop of the batches to try, in whole granules; none if a batch can't be halved.

    A batch is a quarter of a micro-batch, so that all batches together cost as much as a few steps.
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
        to_training_mode: sets the modes in which the model is trained.

    Raises:
        UserError: the result of the loss violates the contract, or is a mean.
        Exception: the loss of a whole batch fails.
    """
    loss, first = partial(sandbox.task.loss, sandbox.model), batches[0]
    with sandbox, exact_fp32():
        to_training_mode()
        switch_off(sandbox.model)
        moved = sandbox.moved_by(lambda: sandbox.call(loss, first.whole, first.start))
        counters = [
            f"{name} changes with every call of the forward or the loss, and the calls per step depend on the cut"
            for name in moved
        ]
        try:
            draws = _draws(sandbox, [batch for batch in batches if not batch.unkeyed])
        except _HalfFails as failure:
            return Found(counters, depends=[str(failure)])
    noisy = sandbox.drew or sandbox.narrow
    verdict, shown = judge(draws, noisy)
    if verdict == "mean":
        fix = "return (sum, number of units), with reduction='sum', or one loss per sample, with reduction='none'"
        raise UserError(f"task.loss returns a mean, not a sum: {shown}", fix, "task")
    depends = [
        f"task.loss isn't a sum over samples: {shown}; possible causes are negatives or statistics from the batch, "
        "the hardest of its samples, or a penalty added once per call"
    ]
    measures = {name: [draw.measures[name] for draw in draws if name in draw.measures] for name in _names(draws)}
    logged = judge_totals("loss", measures, noisy)
    return Found(counters, logged, depends if verdict == "coupled" else [])


def _names(draws: Sequence[Draw]) -> dict[str, None]:
    return dict.fromkeys(name for draw in draws for name in draw.measures)


class _HalfFails(Exception):
    """The loss works for a whole batch but fails for a half."""


def _draws(sandbox: Sandbox, batches: Sequence[Halves]) -> list[Draw]:
    """Measure in training mode, or in eval mode if only training mode draws random numbers."""
    sandbox.drew = False
    draws = [_draw(sandbox, batch) for batch in batches]
    if sandbox.drew:  # such as functional dropout
        sandbox.drew = False
        sandbox.model.eval()
        with suppress(Exception):  # the model may fail in eval mode
            quiet = [_draw(sandbox, batch) for batch in batches]
            if not sandbox.drew:
                return quiet
        sandbox.drew = True
    return draws


def _draw(sandbox: Sandbox, batch: Halves) -> Draw:
    parameters = [parameter for parameter in sandbox.model.parameters() if parameter.requires_grad]
    samples = batch.samples
    whole, measures, gradient = _measure(sandbox, batch.whole, batch.start, samples[0], parameters)
    try:
        first, more, of_first = _measure(sandbox, batch.first, batch.start, samples[1], parameters)
        second, most, of_second = _measure(sandbox, batch.second, batch.middle, samples[2], parameters)
    except Exception as error:
        if is_oom(error):
            raise
        raise _HalfFails(
            f"task.loss works for {counted(samples[0], 'sample')} but fails for {samples[1]} or {samples[2]} of "
            f"them ({type(error).__name__}: {error})"
        ) from error
    size = norm_of(of_first) + norm_of(of_second)
    for whole_gradient, *halves in zip(gradient, of_first, of_second, strict=True):
        whole_gradient -= sum(halves)
    off = float(norm_of(gradient) / size) if size else 0.0
    by_name = {
        name: Draw(pair, more[name], most[name], samples)
        for name, pair in measures.items()
        if name in more and name in most
    }
    return Draw(whole, first, second, samples, off, by_name)


def _measure(
    sandbox: Sandbox, batch: Any, start: int, samples: int, parameters: list[nn.Parameter]
) -> tuple[tuple[float, float], dict[str, tuple[float, float]], list[Tensor]]:
    """Return the loss with its units, its measures, and the gradient, with zeros for parameters without one."""
    sandbox.reset()
    switch_off(sandbox.model)
    loss, units, measures = sandbox.call(
        lambda inputs: checked(sandbox.task.loss(sandbox.model, inputs), samples), batch, start
    )
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, gradient, strict=True)]
    sandbox.narrow = sandbox.narrow or any(tensor.dtype.itemsize < 4 for tensor in dense)
    numbers = {name: (float(total), float(count)) for name, (total, count) in measures.items()}
    return (float(loss.detach()), float(units)), numbers, dense


def switch_off(model: nn.Module) -> None:
    """Switch off dropout and batch statistics.

    They make the loss random or couple samples by design, and are reported elsewhere.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
            if module.running_mean is None:  # without running statistics, eval mode uses those of the batch
                like = next(model.parameters())
                module.running_mean = like.new_zeros(module.num_features)
                module.running_var = like.new_ones(module.num_features)
        elif isinstance(module, Dropout) or "drop" in type(module).__name__.lower():
            module.eval()
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
