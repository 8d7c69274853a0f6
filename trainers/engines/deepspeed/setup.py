"""What comes before DeepSpeed is begun: its package is imported, quiet, and what it is to be told is checked."""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.engine_config import PRECISIONS
from isobatch.trainers.model.targets import import_engine_package

if TYPE_CHECKING:
    import isobatch.conf.groups

OURS = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # clipping is part of what the gradient is multiplied by
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def import_deepspeed(device: torch.device | None = None) -> Any:
    """The package, quiet.

    Args:
        device: that it is to use; None: it is only imported, for processes that are forked from here.

    Raises:
        UserError: it isn't installed.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.disabled = True  # it warns of every device that isn't there
    try:
        deepspeed = import_engine_package("deepspeed")
    finally:
        logger.disabled = False
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed still uses
    # of its inference, and compiled as it starts on a CPU, where there is a compiler
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    if device and device.type == "cpu":
        cpu = import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
        import_module("deepspeed.accelerator").set_accelerator(cpu())
    return deepspeed


def settings_of(config: isobatch.conf.groups.DeepSpeed) -> dict[str, Any]:
    """What DeepSpeed is told: ``engine.config``, and ours, which it doesn't contradict.

    DeepSpeed's sizes of batches are for its own counts: the plan makes the passes, and says which is a step's last.
    """
    offload = {"offload_optimizer": {"device": "cpu"}} if config.offload else {}
    ours = {
        **OURS,
        "zero_optimization": {"stage": config.stage, **offload},
        **{section: {"enabled": False} for section in PRECISIONS if section in config.config},
    }
    return dict(_merged(config.config, ours))


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def refuse_settings(settings: dict[str, Any]) -> None:
    """Raise UserError where DeepSpeed doesn't take ``settings``."""
    config = import_module("deepspeed.runtime.config")
    try:
        config.DeepSpeedConfig(dict(settings))
    except (AssertionError, KeyError, TypeError, ValueError, config.DeepSpeedConfigError) as error:
        said = error.errors() if isinstance(error, ValidationError) else []
        why = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in said) or str(error)
        raise UserError(f"engine.config: DeepSpeed doesn't take it: {why}", key="engine.config") from error
