"""What rank 0 says before step 1, and keeps in the events."""

from __future__ import annotations

from functools import partial

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.outcome import Outcome
from isobatch.conf.terminal import say
from isobatch.trainers.checkpoints.weights import listed
from isobatch.trainers.data.state import TrainState
from isobatch.trainers.loop.metrics import tell
from isobatch.trainers.model.modes import Modes
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.session import Session
from isobatch.trainers.tensors.manifest import Checkpoint

RUN_DEPENDS = "this run isn't the same on other hardware or another batch.per_gpu"
EVALUATION_DEPENDS = "the values of evaluations aren't the same on other hardware or another evaluate.per_gpu"


def report_dependence(run: RunDir | None, what: str, reason: str) -> None:
    """Report why ``what``, one of the above, depends on the cut; nothing where ``run`` is None."""
    tell(run, "depends_on_cut", f"{what}: {reason}", reason=reason)


def make_stream(session: Session, run: RunDir | None) -> Stream:
    """Return the stream of random keys, which reports to ``run`` what makes the run depend on its cut."""
    fixed_cut = session.config.numerics == "bitwise"
    return Stream(
        session.config.seed,
        session.world.device,
        partial(report_dependence, None if fixed_cut else run, RUN_DEPENDS),
        partial(report_dependence, run, EVALUATION_DEPENDS),
    )


def announce_position(
    run: RunDir, state: TrainState, found: Checkpoint | None, before: Outcome | None, weights_from: str | None
) -> None:
    """Say where the training starts: at a checkpoint, from step 0 again, or with other weights."""
    if found:
        run.event("going_on", checkpoint=found.path.name, step=state.steps, samples=state.samples)
        say(f"goes on from step {state.steps} of {state.plan.steps} (checkpoints/{found.path.name})")
    elif before and before.state != "refused":
        say("begins anew: the last attempt ended before its first checkpoint")
    if weights_from:
        run.event("initialised", source=weights_from)
        say(f"weights from {weights_from}")


def announce_frozen(run: RunDir, modes: Modes) -> None:
    """Say which submodules stay in eval mode."""
    if modes.frozen:
        names = list(modes.frozen)
        run.event("frozen", eval_mode=names)
        say(f"stays in eval mode, as model() returned it: {listed(names)}")
