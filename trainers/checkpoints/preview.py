"""What a run will go on with, as far as its checkpoints tell before there is a model. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from conf.explain import ConfigError
from conf.stored import lengthened
from scaling.plan import Plan
from scaling.resolve import continued
from trainers.checkpoints.manifest import Damaged, checkpoints, read
from trainers.rundir import RunDir

if TYPE_CHECKING:
    from conf.schema import RunConfig


def from_checkpoint(plan: Plan, config: RunConfig, run: RunDir) -> Plan:
    """``plan`` as it goes on from the newest checkpoint of ``run`` that can be read; itself without one.

    Raises:
        ConfigError: it can't go on so.
    """
    for path in checkpoints(run):
        with suppress(Damaged):
            header = read(path).header
            longer = lengthened(config, header.identity, header.duration)
            if not longer and header.identity != plan.identity:
                break
            try:
                return continued(plan, header.plan, extends=longer)
            except ValueError as error:
                raise ConfigError(str(error)) from None
    return plan
