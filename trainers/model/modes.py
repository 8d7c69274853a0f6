"""Train mode and eval mode of a model's modules, and which of them are normalisation layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from isobatch.trainers.ranks.internals import Conv, NormBase

TORCH = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, Conv, nn.RNNBase, nn.MultiheadAttention)
# "norm" or "normalization" at the end of a word (LlamaRMSNorm, LayerNorm2d, LayerNormalization, MambaRMSNormGated; not
# NormalizedLinear), and no word after it that names another kind of layer, with a norm in it (WeightNormLinear,
# PreNormBlock).
NAME = re.compile(
    r"(norm|Norm|NORM)(ali[sz]ation)?(?![a-z])"
    r"(?!.*(?i:linear|conv|embed|attention|attn|mlp|block|layer|former|encoder|decoder|net))"
)


class Modes:
    """Put a model into train mode, except for the submodules that stay in eval mode.

    An outermost submodule in eval mode stays in eval mode, with its own submodules, if it is a normalisation layer, or
    if it has parameters and none is trained. Everything else is trained. So is a model that is in eval mode as a whole,
    as Hugging Face's ``from_pretrained`` returns it.

    Attributes:
        frozen: names and modules of the submodules that stay in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = list(_outermost_in_eval(model, "")) if model.training else []
        self.frozen = {name: module for name, module in found if _stays(module)}
        self._kept = {inner: inner.training for module in self.frozen.values() for inner in module.modules()}

    def train(self) -> None:
        """Put the model into train mode, except for the frozen submodules."""
        self._model.train()
        for module in self.frozen.values():
            module.eval()
        for module, training in self._kept.items():
            module.training = training

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether ``module`` keeps its mode in training."""
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
    """Put ``model`` into eval mode; restore the mode of each module afterwards."""
    modes, training = [(module, module.training) for module in model.modules()], model.training
    model.eval()
    yield
    if training:
        model.train()  # the model's own train() may undo its eval(), such as merging adapters into weights
    for module, mode in modes:
        module.training = mode


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalisation layer.

    Instances of torch's normalisation layers are. So are modules whose class, or a base of it, has a name in which
    ``norm`` or ``normalization`` ends a word. Subclasses of torch's layers with matrices (nn.Linear, nn.Conv2d, …)
    never are.

    >>> is_norm(nn.InstanceNorm2d(3)), is_norm(nn.Linear(3, 3))
    (True, False)
    """
    if isinstance(module, TORCH):
        return True
    return not isinstance(module, MATRICES) and any(NAME.search(cls.__name__) for cls in type(module).__mro__)
