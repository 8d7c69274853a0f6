"""Recognise normalisation layers: torch's, and those of other libraries and of the user's by the names of classes."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

TORCH = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, _ConvNd, nn.RNNBase, nn.MultiheadAttention)
# "norm" or "normalization" at the end of a word (LlamaRMSNorm, LayerNorm2d, LayerNormalization, MambaRMSNormGated; not
# NormalizedLinear), and behind it nothing that says that the layer is another one, with a norm in it (WeightNormLinear,
# PreNormBlock).
NAME = re.compile(
    r"(norm|Norm|NORM)(ali[sz]ation)?(?![a-z])"
    r"(?!.*(?i:linear|conv|embed|attention|attn|mlp|block|layer|former|encoder|decoder|net))"
)


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalisation layer.

    It is one by its type (torch's, and subclasses), or by the name of its class or of one of that class's bases:
    ``norm`` or ``normalization`` ends a word of it. Subclasses of torch's layers with matrices (nn.Linear, nn.Conv2d,
    …) never are.

    >>> is_norm(nn.InstanceNorm2d(3)), is_norm(nn.Linear(3, 3))
    (True, False)
    """
    if isinstance(module, TORCH):
        return True
    return not isinstance(module, MATRICES) and any(NAME.search(cls.__name__) for cls in type(module).__mro__)
