"""Find what a bandit knows of the critical batch when its run begins."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from isobatch.conf.controllers import Bandit
from isobatch.conf.existing import ever_trained
from isobatch.conf.identity import run_directory
from isobatch.conf.rundir.reading import metric_lines
from isobatch.conf.schema import RunConfig
from isobatch.scaling.control import Belief
from isobatch.scaling.errors import UserError
from isobatch.scaling.learned import belief, intervals_in
from isobatch.scaling.limits import LARGEST
from isobatch.scaling.reading import Unreadable, read_json

VAGUE = (4, 2.0)  # a critical batch of 4 times the first batch, within a factor of 4
LEAST_DOUBLINGS = 1.0  # of what another run learned: its critical batch need not be this one's


def first_belief(config: RunConfig, wanted: Bandit, start: int) -> Belief:
    """Return what a bandit knows of the critical batch at the start of its run, whose first batch is ``start`` samples.

    A run that has begun keeps what it began with. A new one takes over what the run in ``control.prior`` learned, or
    nearly nothing.

    Raises:
        UserError: ``control.prior`` isn't the directory of a run that learned.
    """
    here = run_directory(config)
    if ever_trained(here) and (known := _belief_in(here)):
        return known
    if wanted.prior is None:
        return Belief(float(min(VAGUE[0] * start, LARGEST)), VAGUE[1])
    directory = Path(os.path.expanduser(wanted.prior))
    if not directory.is_dir():
        problem = f"control.prior={wanted.prior} doesn't exist"
        raise UserError(problem, "name a run directory, or leave it out", "control.prior", wanted.prior)
    prior, intervals = _belief_in(directory), intervals_in(metric_lines(directory))
    if prior is None or not intervals:
        problem = f"control.prior={wanted.prior} isn't a run that control=bandit trained"
        raise UserError(problem, "name the directory of one, or leave it out", "control.prior", wanted.prior)
    learned = belief(intervals, prior)
    return Belief(learned.critical, max(LEAST_DOUBLINGS, learned.doublings))


def _belief_in(directory: Path) -> Belief | None:
    """Return the belief with which the run in ``directory`` began; None if its plan has none or can't be read."""
    with suppress(FileNotFoundError, Unreadable, KeyError, TypeError, ValueError):
        prior = read_json(directory / "plan.json")["control"]["prior"]
        critical, doublings = (float(prior[name]) for name in ("critical", "doublings"))
        if 0 < critical <= LARGEST and 0 < doublings <= LARGEST:
            return Belief(critical, doublings)
    return None
