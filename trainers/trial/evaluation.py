"""Try a task's ``evaluate`` and ``summarise`` on one batch before step 1, to find mistakes before training."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from isobatch.scaling.errors import UserError
from isobatch.trainers.data.validation import Validation
from isobatch.trainers.loop.evaluate import measure, summarise
from isobatch.trainers.model.precision import autocast
from isobatch.trainers.ranks.failure import is_oom, user_line
from isobatch.trainers.tasks.task import Totals
from isobatch.trainers.trial.halves import OWN, TWICE, Draw, Halves, differ, judge_totals
from isobatch.trainers.trial.sandbox import Sandbox, exact_fp32
from isobatch.trainers.trial.training import Found

NOTHING = (0.0, 0.0)
MISTAKES = (NameError, AttributeError, TypeError, ImportError)  # errors that other data wouldn't fix


def validation_halves(validation: Validation, most: int) -> Halves:
    """Fetch the first ``most`` rows of the validation data, as one batch and as two."""
    stop = min(most, len(validation.rows))
    middle = stop // 2
    whole, second = validation[0, stop], validation[middle, stop]
    first = validation[0, middle].batch if middle else None
    return Halves(0, middle, stop, whole.batch, first, second.batch, whole.unkeyed is not None)


def own_generators_of_validation(validation: Validation) -> list[str]:
    """Fetch a few rows twice, and report whether the results differ."""
    number = min(TWICE, len(validation.rows))
    first, second = ([validation[row, row + 1].batch for row in range(number)] for _ in range(2))
    return [f"[index] of the validation data, or collate(), {OWN}"] if differ(first, second) else []


def try_evaluation(sandbox: Sandbox, batch: Halves, precision: str) -> Found:
    """Call ``evaluate`` on a batch of validation data and on its halves, in eval mode, then ``summarise``.

    Args:
        precision: the run's precision.

    Raises:
        UserError: one of them violates the contract, or has a mistake.
        Exception: memory ran out.
    """
    task, model = sandbox.task, sandbox.model

    def work(inputs: Any) -> Totals:
        with autocast(precision, sandbox.device):
            return measure(task, model, inputs)

    def totals(inputs: Any, start: int) -> Totals:
        sandbox.reset()
        return sandbox.call(work, inputs, start)

    own = task.has("evaluate")
    with sandbox, torch.no_grad(), exact_fp32():
        model.eval()
        with _rejecting("evaluate" if own else "loss, in eval mode,", Exception):  # would fail in any evaluation
            whole = totals(batch.whole, batch.start)
        with _rejecting("summarise", MISTAKES):  # other errors may come from having the totals of only one batch
            summarise(task, whole)
        if not own or batch.unkeyed or batch.middle == batch.start:  # the loss was judged in training mode
            return Found()
        first, second = totals(batch.first, batch.start), totals(batch.second, batch.middle)
    draws = {
        name: [Draw(pair, first.get(name, NOTHING), second.get(name, NOTHING), batch.samples)]
        for name, pair in whole.items()
    }
    return Found(depends=judge_totals("evaluate", draws, noisy=sandbox.drew or sandbox.narrow))


@contextmanager
def _rejecting(method: str, mistakes: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    """Convert ``mistakes`` to UserError, except running out of memory, which smaller batches may avoid."""
    try:
        yield
    except mistakes as error:
        if isinstance(error, UserError) or is_oom(error):
            raise
        raise UserError(
            f"task.{method} has a mistake, found by calling it on one batch of the validation data: "
            f"{type(error).__name__}: {error}{user_line(traceback.extract_tb(error.__traceback__))}"
        ) from error
