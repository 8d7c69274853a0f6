"""What a run will go on with, as far as its checkpoints tell before there is a model. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from isobatch.conf.existing import lengthened
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued
from isobatch.trainers.tensors.manifest import Damaged, checkpoints, read

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def from_checkpoint(plan: Plan, config: RunConfig, run: RunDir) -> Plan:
    """``plan`` as it goes on from the newest checkpoint of ``run`` that can be read; itself without one.

    Raises:
        UserError: it can't go on so.
    """
    for path in checkpoints(run):
        with suppress(Damaged):
            header = read(path).header
            longer = lengthened(config, header.identity, header.duration)
            if not longer and header.identity != plan.identity:
                break
            return continued(plan, header.plan, extends=longer)
    return plan
