"""What a task is: a small class of the user's. Only model, train_data and loss are needed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sized
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from isobatch.scaling.errors import UserError
from isobatch.trainers.model.targets import build, check_call, locate, made, science_of

if TYPE_CHECKING:
    from isobatch.conf.schema import Data, RunConfig


class Task(Protocol):
    """The three methods that every task has. It may have these, too:

    val_data() -> Dataset; evaluate(model, batch) -> {name: (sum, count)}; summarise(totals) -> {name: value};
    augment(sample, generator) -> sample; collate(samples) -> batch; param_groups(model) -> list of optimizer groups;
    prepare(), which fetches the data: on one process of each machine, before any rank opens it.

    A group may have, beside ``params``: ``lr``, a factor of the plan's; ``weight_decay``, instead of the optimizer's;
    ``trust``: whether LAMB and LARS scale its tensors by their norms (they do, unless its weight_decay is 0);
    ``muon``: whether Muon takes it, or AdamW (without it, inner matrices are Muon's); and what its optimizer knows.
    """

    def model(self) -> nn.Module: ...

    def train_data(self) -> Any:
        """A map-style dataset: ``len()`` and ``[index]``."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float | Tensor] | Tensor:
        """Return the sum of the losses over the batch's units with the number of units, or one loss per sample.

        Never a mean: the loss of a step is divided once, by the number of units in its whole global batch.
        """


REQUIRED = {"model": "model() -> nn.Module", "train_data": "train_data() -> Dataset", "loss": "loss(model, batch)"}


OPTIONAL = ("val_data", "evaluate", "summarise", "augment", "collate", "param_groups", "prepare")


def make_task(config: RunConfig) -> Task:
    """The task that the config names.

    Raises:
        UserError: ``task._target_`` doesn't import, isn't a class or lacks a method; or ``task.args`` don't fit it.
    """
    target = config.task.target
    cls = locate("task._target_", target)
    if not inspect.isclass(cls):
        raise UserError(f"task._target_={target} is a {type(cls).__name__}, not a class")
    for name in vars(cls):
        near = get_close_matches(name, OPTIONAL, n=1, cutoff=0.75)
        if name.startswith("_"):  # the task's own
            continue
        if near and name not in OPTIONAL and not hasattr(cls, near[0]):
            warnings.warn(f"nothing calls {cls.__name__}.{name}; did you mean {near[0]}?", stacklevel=2)
    elsewhere = {"model": config.model.target, "train_data": config.data.target}
    missing = [
        signature
        for name, signature in REQUIRED.items()
        if not callable(getattr(cls, name, None)) and elsewhere.get(name) is None
    ]
    if missing:
        raise UserError(f"task._target_={target} lacks {', '.join(missing)}")
    local = config.task.local
    args = science_of(config.task.args, local)
    check_call("task.args", target, cls, (), args, local)
    task: Any = cls(**args, **made("task.local", local))
    if config.data.target is not None:
        _with_data(task, config.data.target, config.data)
    return cast(Task, task)


def make_model(config: RunConfig, task: Task) -> nn.Module:
    """Return the model that ``model._target_`` names, made with ``model.args``; without it the task's own.

    Raises:
        UserError: it isn't a module.
    """
    if config.model.target is None:
        model, what = task.model(), "task.model()"
    else:
        model, what = build("model", config.model.target, config.model.args), f"model._target_={config.model.target}"
    if not isinstance(model, nn.Module):
        raise UserError(f"{what} gives a {type(model).__name__}, not a torch.nn.Module", key="model._target_")
    return model


def _with_data(task: Any, target: str, data: Data) -> None:
    """Give ``task`` the data that ``data._target_`` makes; its own validation data would be of other data."""
    args, val_args, local = data.args, data.val_args, data.local
    task.train_data = lambda: build("data", target, args, local=local)
    task.val_data = lambda: None if val_args is None else build("data", target, {**args, **val_args}, local=local)


def open_data(task: Task, config: RunConfig) -> Any:
    """The task's training data, checked against what its YAML states.

    Raises:
        UserError: not a map-style dataset, empty, or of another length than ``task.train_samples``.
    """
    data = task.train_data()
    length = check_map_style(data, "train_data()")
    if length == 0:
        raise UserError(f"train_data() of task {config.task.name} has 0 samples; a run needs at least 1")
    if config.task.train_samples not in (None, length):
        raise UserError(
            f"train_data() of task {config.task.name} has {length} samples, but task.train_samples="
            f"{config.task.train_samples}; correct that key, or set it to null to take what is there"
        )
    return data


def check_map_style(data: Any, what: str) -> int:
    """The length of a map-style dataset. Raises UserError for anything else."""
    if isinstance(data, IterableDataset):
        raise UserError(
            f"{what} is an IterableDataset ({type(data).__name__}): its order can't be recomputed on another number of "
            "ranks or after a stop; give a map-style dataset with len() and [index]"
        )
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise UserError(f"{what} is a {type(data).__name__}; it has to be a map-style dataset with len() and [index]")
    return len(data)
