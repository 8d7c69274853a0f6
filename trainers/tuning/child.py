"""Estimate the memory of a plan in a child of the launcher, which stays torch-free."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from isobatch.scaling.tuning.estimated import Estimate, from_json
from isobatch.trainers.launch.children import answer_of
from isobatch.trainers.launch.worker import import_torch
from isobatch.trainers.ranks.signals import Stop

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig
    from isobatch.scaling.plan import Plan


def estimate_memory(config: RunConfig, plan: Plan, stop: Stop) -> Estimate:
    """Estimate the memory of a step of ``plan``.

    Raises:
        Stopped: a signal came first. The child is killed, since within the user's code it would only record a signal.
    """

    def work() -> str:
        import_torch(config)
        from isobatch.trainers.tuning.outlook import outlook

        return json.dumps(outlook(config, plan).as_json())

    return from_json(json.loads(answer_of(work, stop, "while the memory was estimated")))
