"""The interface of a task: a small class of the user with the required methods model, train_data and loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from isobatch.conf.terminal import say_once
from isobatch.scaling.errors import UserError
from isobatch.trainers.model.targets import build, locate
from isobatch.trainers.tasks.losses import summed

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig

Totals = dict[str, tuple[float, float]]
"""Sums and counts by name."""


class Task:
    """A user's task with defaults for the methods that it doesn't define.

    Methods are looked up at each call, so the user's object may set them as attributes at any time.

    Args:
        own: the user's object.
    """

    def __init__(self, own: Any) -> None:
        self.own = own

    def has(self, name: str) -> bool:
        """Return True if the user's object defines the method; None counts as undefined."""
        return getattr(self.own, name, None) is not None

    def model(self) -> nn.Module:
        """Return the model to train."""
        model: nn.Module = self.own.model()
        return model

    def train_data(self) -> Any:
        """Return a map-style dataset: ``len()`` and ``[index]``."""
        return self.own.train_data()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """Return the sum of the losses over the batch's units and the number of units, or one loss per sample.

        Never return a mean: the loss of a step is divided once, by the units of the whole global batch. Measures
        {name: (sum, count)} may follow, as in ``(losses, measures)`` or ``(sum, units, measures)``. Their ratios are
        logged as ``train/<name>``.
        """
        return self.own.loss(model, batch)

    def flops_per_unit(self, model: nn.Module) -> Any:
        """Return the floating-point operations of forward and backward for one unit. Default: None, not known."""
        return self.own.flops_per_unit(model) if self.has("flops_per_unit") else None

    def val_data(self) -> Any:
        """Return a map-style dataset to evaluate on, or None."""
        return self.own.val_data() if self.has("val_data") else None

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        """Return {name: (sum, count)} of a batch of validation data. Default: its loss, and the loss's measures."""
        if self.has("evaluate"):
            return self.own.evaluate(model, batch)
        loss, units, measures = summed(self.loss(model, batch))
        return {"loss": (loss, units), **measures}

    def summarise(self, totals: Totals) -> Any:
        """Return {name: value}, derived from the sums and counts of a whole evaluation. Default: none."""
        return self.own.summarise(totals) if self.has("summarise") else {}

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        """Return a randomly augmented training sample. Default: the sample itself."""
        return self.own.augment(sample, generator) if self.has("augment") else sample

    def collate(self, samples: list[Any]) -> Any:
        """Return samples as a batch. Default: torch's ``default_collate``; UserError if that can't take them."""
        if self.has("collate"):
            return self.own.collate(samples)
        try:
            return default_collate(samples)
        except (RuntimeError, KeyError, TypeError) as error:
            shapes = list(dict.fromkeys(map(_shapes, samples)))
            if len(shapes) == 1 and not isinstance(error, TypeError):  # such as memory that ran out
                raise
            said, own = str(error).splitlines()[0], f"give {type(self.own).__name__} a collate(samples)"
            images = "<class 'PIL." in said
            why = f"they have the shapes {shapes[0]} and {shapes[1]}" if shapes[1:] and not images else said
            problem = f"the samples can't be collated into a batch: {why}"
            fix = f"{own}, or return tensors of one size from [index]"
            if images:
                example = "torch.from_numpy(numpy.array(image))"
                fix = f"convert the image to a tensor in [index], such as by {example}, or {own}"
            raise UserError(problem, fix, "task._target_") from error

    def param_groups(self, model: nn.Module) -> Any:
        """Return a list of parameter groups, or None for the default groups.

        Besides ``params``, a group can have ``lr``, a factor of the plan's LR; ``weight_decay``, instead of the
        optimizer's; ``trust``: LAMB and LARS scale its tensors by their norms (default: unless its weight_decay is 0);
        ``muon``: Muon steps it, not AdamW (default: only inner matrices); and options of its optimizer.
        """
        return self.own.param_groups(model) if self.has("param_groups") else None

    def prepare(self) -> None:
        """Fetch the data. Called on one process of each machine, before any rank opens the data."""
        if self.has("prepare"):
            self.own.prepare()


REQUIRED = {"model": "model() -> nn.Module", "train_data": "train_data() -> Dataset", "loss": "loss(model, batch)"}
# What other trainers call these methods, where the name is too different to be guessed.
ELSEWHERE = {
    **dict.fromkeys(("validate", "validation_step", "test_step", "eval_step"), "evaluate"),
    **dict.fromkeys(("validation_data", "valid_data", "val_dataset", "val_dataloader", "eval_dataset"), "val_data"),
    **dict.fromkeys(("collate_fn", "data_collator"), "collate"),
    "prepare_data": "prepare",
    **dict.fromkeys(("configure_optimizers", "parameter_groups"), "param_groups"),
}
OPTIONAL = [name for name in vars(Task) if not name.startswith("_") and name != "has" and name not in REQUIRED]


def _shapes(sample: Any) -> str:
    """Return the shapes of the tensors and arrays in a sample, as text."""
    if isinstance(sample, tuple | list):
        return f"({', '.join(map(_shapes, sample))})"
    if isinstance(sample, Mapping):
        return f"{{{', '.join(f'{name}: {_shapes(value)}' for name, value in sample.items())}}}"
    if isinstance(sample, int | float):
        return "number"
    return str(list(sample.shape)) if hasattr(sample, "shape") else type(sample).__name__


def make_task(config: RunConfig) -> Task:
    """Make the config's task.

    Raises:
        UserError: ``task._target_`` doesn't import, isn't a class or lacks a method; or ``task.args`` don't fit it.
    """
    target = config.task.target
    cls = locate("task._target_", target)
    if not inspect.isclass(cls):
        raise UserError(f"task._target_={target} is a {type(cls).__name__}, not a class", "", "task._target_", target)
    elsewhere = {"model": config.model.target, "train_data": config.data.target}
    absent = [name for name in REQUIRED if not callable(getattr(cls, name, None)) and elsewhere.get(name) is None]
    if missing := [REQUIRED[name] for name in absent]:
        raise UserError(f"task._target_={target} lacks {', '.join(missing)}", "", "task._target_", target)
    own: Any = build("task", target, config.task.args, local=config.task.local)
    if (source := config.data.target) is not None:  # replaces the validation data, too
        data, val_args = config.data, config.data.val_args
        val = None if val_args is None else {**data.args, **val_args}
        own.train_data = lambda: build("data", source, data.args, local=data.local)
        own.val_data = lambda: None if val is None else build("data", source, val, local=data.local)
    task = Task(own)
    _warn_of_near_misses(task)
    if task.has("evaluate") and not task.has("val_data"):
        say_once(f"warning: {cls.__name__} has evaluate() and no val_data(), so nothing is evaluated")
    return task


def make_model(config: RunConfig, task: Task) -> nn.Module:
    """Return the model of ``model._target_``, or of the task. Raises UserError if it isn't a module."""
    if config.model.target is None:
        model, source = task.model(), "task.model()"
    else:
        model, source = build("model", config.model.target, config.model.args), f"model._target_={config.model.target}"
    if not isinstance(model, nn.Module):
        raise UserError(f"{source} returned a {type(model).__name__}, not a torch.nn.Module", key="model._target_")
    return model


def _warn_of_near_misses(task: Task) -> None:
    """Warn about methods named like an optional method that the task doesn't have, unless the task calls them."""
    cls = type(task.own)
    own = {name for name in vars(cls) if not name.startswith("_")} - {*OPTIONAL} - _names_used(cls)
    for name in (name for name in vars(cls) if name in own):
        near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, OPTIONAL, n=1, cutoff=0.75)
        if near and not task.has(near[0]):
            say_once(f"warning: Isobatch never calls {cls.__name__}.{name}; did you mean {near[0]}?")


def _names_used(cls: type) -> set[str]:
    """Return the names of attributes and globals in the code of a class's methods."""
    methods = [getattr(value, "__func__", getattr(value, "fget", value)) for value in vars(cls).values()]
    codes = [method.__code__ for method in methods if inspect.isfunction(method)]
    for code in codes:  # which grows by the functions within functions
        codes += filter(inspect.iscode, code.co_consts)
    return {name for code in codes for name in code.co_names}


def open_data(task: Task, config: RunConfig) -> Any:
    """Open the task's training data and validate its type and length.

    Raises:
        UserError: the data isn't a map-style dataset, is empty, or has another length than ``task.train_samples``.
    """
    data = task.train_data()
    length = check_map_style(data, "train_data()")
    if length == 0:
        raise UserError(f"train_data() of task {config.task.name} has 0 samples", "a run needs at least 1")
    if config.task.train_samples not in (None, length):
        stated = config.task.train_samples
        problem = f"train_data() of task {config.task.name} has {length} samples, but task.train_samples={stated}"
        fix = "correct that key, or set it to null to accept any length"
        raise UserError(problem, fix, "task.train_samples", stated)
    return data


def check_map_style(data: Any, source: str) -> int:
    """Return the length of a map-style dataset. Raises UserError for anything else."""
    if isinstance(data, IterableDataset):
        raise UserError(
            f"{source} is an IterableDataset ({type(data).__name__}): its order can't be recomputed on another number "
            "of ranks or after a stop",
            "give a map-style dataset with len() and [index]",
        )
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        fix = "it has to be a map-style dataset with len() and [index]"
        raise UserError(f"{source} is a {type(data).__name__}", fix)
    return len(data)
