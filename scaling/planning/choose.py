"""``optimizer=auto``: which optimizer suits a task's family at a global batch, and why."""

from __future__ import annotations

from collections.abc import Collection

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.plan import Choice
from isobatch.scaling.planning.advice import check_family

LARGE = 1024  # samples a step, from which on a batch counts as large
# By the task's family: what is taken below LARGE, and from it on; the first that has a base LR.
TABLE = {
    "images": (("sgd", "adamw"), ("lars", "lamb", "sgd")),
    "detection": (("sgd", "adamw"), ("lars", "adamw", "sgd")),
    "volumes": (("adamw", "sgd"), ("adamw", "lamb", "sgd")),
    "rnn": (("adamw", "sgd"), ("lamb", "adamw")),
    "finetune": (("adamw", "sgd"), ("lamb", "adamw")),
    "speech": (("adamw", "sgd"), ("lamb", "adamw")),
    "rl": (("adamw", "sgd"), ("adamw", "lamb")),
    "language": (("adamw", "sgd"), ("adamw", "lamb")),
    None: (("adamw", "sgd"), ("lamb", "adamw")),
}
WHY = {
    "sgd": "SGD with momentum is what {family} are tuned with{below}",
    "adamw": "AdamW is what {family} are tuned with{below}",
    "lars": "LARS holds each layer's LR to the size of its weights, for {family} from {large} on (You et al. 2017)",
    "lamb": "LAMB does that for Adam, for {family} from {large} on (You et al. 2020)",
}
CAUTION = (
    "tuned, Nesterov momentum and Adam match LARS and LAMB at the batches of their papers (Nado et al. 2021), and no "
    "choice or rule holds for every workload (Shallue et al. 2018)"
)


def choose(family: str | None, global_size: int, with_base: Collection[str]) -> Choice:
    """Return the optimizer for a global batch of ``global_size`` samples, and why.

    Args:
        with_base: optimizers that have a base LR: tuned for the task, or a usual one.

    Raises:
        UserError: an unknown family, or none of its optimizers has a base LR.
    """
    check_family(family)
    large = global_size >= LARGE
    fit = [name for name in TABLE[family][large] if name in with_base]
    if not fit:
        raise UserError(
            f"optimizer=auto: of {', '.join(TABLE[family][large])} none has a base LR for this task, nor a usual one",
            "name an optimizer, and give lr.base and lr.base_batch, or lr.peak",
            "optimizer",
            "auto",
        )
    chosen, others = fit[0], fit[1:]
    what = f"tasks of the family {family}" if family else "tasks of no stated family"
    why = WHY[chosen].format(family=what, large=f"{LARGE:,}", below="" if large else f" at batches below {LARGE:,}")
    alternatives = [f"optimizer={name}" for name in others] + ["optimizer=adafactor where memory is short"]
    text = f"auto, at {counted(global_size, 'sample')}: {why}; or {', '.join(alternatives)}"
    if large:
        text += f"; with a warmup and stronger regularisation than at small batches. {CAUTION[0].upper()}{CAUTION[1:]}"
    return Choice(chosen, text)
