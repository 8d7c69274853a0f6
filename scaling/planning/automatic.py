"""Resolve ``optimizer=auto`` from the rest of the config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isobatch.conf.compose import compose
from isobatch.conf.hardware import world_size
from isobatch.conf.keys import HERE
from isobatch.conf.overrides import parse
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.plan import Choice
from isobatch.scaling.planning.choose import WHY, choose
from isobatch.scaling.planning.resolve import resolve
from isobatch.scaling.reading import read_yaml


def configured(overrides: Sequence[str], config_dir: Path | str | None = None) -> RunConfig:
    """Return the config of ``overrides``, with ``optimizer=auto`` resolved.

    Raises:
        UserError: an override, a choice or a value isn't valid.
    """
    config = compose(overrides, config_dir)
    if config.optimizer.name != "auto":
        return config
    choice = choose_optimizer(config)
    others = [text for text in overrides if parse(text).key_or_group != "optimizer"]
    try:
        config = compose([*others, f"optimizer={choice.name}"], config_dir)
    except UserError as error:
        problem = f"{error.problem} (optimizer=auto chose {choice.name})"
        raise UserError(problem, error.fix, error.key, error.value) from None
    return config.model_copy(update={"chosen": {"optimizer": choice.why}})


def choose_optimizer(config: RunConfig) -> Choice:
    """Return the best optimizer for the task and batch of ``config``, ignoring its own optimizer.

    Raises:
        UserError: the config gives a learning rate, the global batch isn't known, or no optimizer has a base LR.
    """
    if given := [key for key in ("lr.base", "lr.peak") if key in config.given]:
        problem = f"{given[0]} is for one optimizer, but optimizer=auto chooses among several"
        raise UserError(problem, "name the optimizer that it is for", "optimizer", "auto")
    if config.batch.global_size == "all" and config.task.train_samples is None:
        problem = "optimizer=auto needs the global batch, but batch.global_size=all depends on the data"
        raise UserError(problem, "give task.train_samples=N, or name an optimizer", "optimizer", "auto")
    # A placeholder LR: the batches of a run don't depend on its value.
    neutral = {"rule": "none", "power": None, "noise_scale": None, "scale_weight_decay": False, "peak": 1.0}
    lr = config.lr.model_copy(update={**neutral, "warmup_from": None})
    optimizer = compose(["optimizer=sgd"]).optimizer
    plan = resolve(config.model_copy(update={"lr": lr, "optimizer": optimizer}), world_size(config))
    batch = max(stage.cut.global_size for stage in plan.stages)
    with_usual = {name for name in WHY if read_yaml(HERE / f"optimizer/{name}.yaml").get("usual")}
    return choose(config.task.family, batch, {*config.task.tuned, *with_usual})
