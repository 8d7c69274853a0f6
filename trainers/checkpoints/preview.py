"""Foresee the plan with which a run resumes, as far as its checkpoints tell before there is a model. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from isobatch.conf.existing import lengthened
from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.plan import Plan
from isobatch.scaling.planning.resolve import continued
from isobatch.trainers.tensors.manifest import Damaged, read
from isobatch.trainers.tensors.names import checkpoints

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def from_checkpoint(plan: Plan, config: RunConfig, run: RunDir) -> Plan:
    """Return ``plan`` as it continues from the newest readable checkpoint of ``run``; without one, as it is.

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
