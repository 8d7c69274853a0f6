"""Choose an optimizer for a task's family and a global batch (``optimizer=auto``)."""

from __future__ import annotations

from collections.abc import Collection

from isobatch.scaling.errors import UserError
from isobatch.scaling.families import LARGE, optimizers
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import Choice

WHY = {
    "sgd": "SGD with momentum is the usual choice for {family}{below}",
    "adamw": "AdamW is the usual choice for {family}{below}",
    "lars": "LARS scales each layer's LR by the norm of its weights, for {family} from {large} on (You et al. 2017)",
    "lamb": "LAMB scales Adam's step of each layer likewise, for {family} from {large} on (You et al. 2020)",
}
CAUTION = (
    "tuned, Nesterov momentum and Adam match LARS and LAMB at the batches of their papers (Nado et al. 2021), and no "
    "choice or rule holds for every workload (Shallue et al. 2018)"
)


def choose(family: str | None, global_size: int, with_base: Collection[str]) -> Choice:
    """Return the optimizer for a global batch of ``global_size`` samples, and the reason.

    Args:
        with_base: optimizers with a base LR, tuned for the task or usual.

    Raises:
        UserError: none of the suitable optimizers has a base LR.
    """
    large = global_size >= LARGE
    suited = optimizers(family, large)
    fit = [name for name in suited if name in with_base]
    if not fit:
        raise UserError(
            f"optimizer=auto: none of {', '.join(suited)} has a base LR, tuned for this task or usual",
            "name an optimizer, and give lr.base and lr.base_batch, or lr.peak",
            "optimizer",
            "auto",
        )
    chosen, others = fit[0], fit[1:]
    tasks = f"tasks of the family {family}" if family else "tasks without a stated family"
    why = WHY[chosen].format(family=tasks, large=f"{LARGE:,}", below="" if large else f" at batches below {LARGE:,}")
    alternatives = [f"optimizer={name}" for name in others] + ["optimizer=adafactor if memory is short"]
    text = f"auto, at {counted(global_size, 'sample')}: {why}; or {', '.join(alternatives)}"
    if large:
        text += f"; with a warmup and stronger regularisation than at small batches. {CAUTION[0].upper()}{CAUTION[1:]}"
    return Choice(chosen, text)
