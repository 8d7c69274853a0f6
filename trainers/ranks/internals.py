"""What Isobatch uses of torch's internals, in one place to check when torch changes.

Names are imported from here. Members of torch's classes can't be; ``MEMBERS`` lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Conv
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.utils.parametrizations import _WeightNorm as WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "BatchNorm", "Conv", "Dropout", "HashStore", "NormBase", "PrefixStore", "Store", "TCPStore", "TorchDispatchMode",
    "WeightNorm", "disable_current_modes", "set_group_timeout", "tree_leaves", "tree_map_only",
]  # fmt: skip

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

_c10d = torch.distributed.distributed_c10d
set_group_timeout = getattr(_c10d, "set_timeout", None) or _c10d._set_pg_timeout  # torch 2.14 made it public
foreach_add, foreach_add_ = torch._foreach_add, torch._foreach_add_
foreach_addcmul_, foreach_copy_, foreach_lerp_ = torch._foreach_addcmul_, torch._foreach_copy_, torch._foreach_lerp_
foreach_mul_, foreach_norm, foreach_zero_ = torch._foreach_mul_, torch._foreach_norm, torch._foreach_zero_
fused_adamw_ = torch._fused_adamw_
get_cudnn_tf32, set_cudnn_tf32 = torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32


def import_compiler() -> None:
    """Import torch's compiler, which optimizers import on first use; that takes most of a second."""
    import torch._dynamo  # noqa: F401


def fake_tensor_mode() -> Any:
    """Return the class of the mode whose tensors have no memory; its import takes a part of a second."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode


def fsdp_collectives() -> tuple[Any, Any]:
    """Return the classes of FSDP's all-gather and reduce-scatter; their import takes most of a second."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    return DefaultAllGather, DefaultReduceScatter


MEMBERS = {  # class → members that are called, read or overridden
    "torch.Tensor": "_base _version",
    "torch.nn.Module": "_buffers _modules",
    "torch.nn.modules.batchnorm._BatchNorm": "_check_input_dim",
    "torch.nn.parallel.DistributedDataParallel": "_check_reducer_finalized _module_parameters",
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter": "_shutdown_workers _workers",
    "torch.distributed.elastic.agent.server.api.SimpleElasticAgent": "_exit_barrier _monitor_workers _rendezvous "
    "_restart_workers _start_workers _stop_workers",
}
