"""Train mode and eval mode of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from isobatch.trainers.model.norms import is_norm


class Modes:
    """Put a model into train mode, except for the submodules that stay in eval mode.

    Of the outermost submodules in eval mode, one stays in eval mode, with all that is in it, if it is a normalisation
    layer, or has parameters of which none is trained. Everything else is trained. So is all of a model that is in eval
    mode as a whole, as ``from_pretrained`` of Hugging Face returns it.

    Attributes:
        frozen: the names and modules of what stays in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = list(_outermost_in_eval(model, "")) if model.training else []
        self.frozen = {name: module for name, module in found if _stays(module)}
        self._kept = {inner: inner.training for module in self.frozen.values() for inner in module.modules()}

    def train(self) -> None:
        """Put the model into train mode, except for what stays in eval mode."""
        self._model.train()
        for module in self.frozen.values():
            module.eval()
        for module, training in self._kept.items():
            module.training = training

    def __contains__(self, module: nn.Module) -> bool:
        """Tell whether ``module`` keeps its mode in training."""
        return module in self._kept


def _outermost_in_eval(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if child.training:
            yield from _outermost_in_eval(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _stays(module: nn.Module) -> bool:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return is_norm(module) or (bool(trained) and not any(trained))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode; afterwards give each of its modules the mode that it had."""
    modes, training = [(module, module.training) for module in model.modules()], model.training
    model.eval()
    yield
    if training:
        model.train()  # a method of its own undoes what it did for eval mode, say merging adapters into weights
    for module, mode in modes:
        module.training = mode
