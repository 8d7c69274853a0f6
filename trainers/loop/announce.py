"""What rank 0 says before step 1, and keeps in the events."""

from __future__ import annotations

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


def make_stream(session: Session, run: RunDir | None) -> Stream:
    """Return the stream of random keys, which reports what makes the run depend on its cut.

    Args:
        run: None on ranks but 0, where nothing is said.
    """

    def tell_of_training(reason: str) -> None:
        if session.config.numerics != "bitwise":  # where no hardware changes the cut
            depends_on_hardware(run, reason)

    def tell_of_evaluation(reason: str) -> None:
        tell(run, "depends_on_cut", evaluation_depends_on_cut(reason), reason=reason)

    return Stream(session.config.seed, session.world.device, tell_of_training, tell_of_evaluation)


def depends_on_hardware(run: RunDir | None, reason: str) -> None:
    """Report why the run isn't the same on other hardware."""
    text = f"this run isn't the same on other hardware or another batch.per_gpu: {reason}"
    tell(run, "depends_on_cut", text, reason=reason)


def evaluation_depends_on_cut(reason: str) -> str:
    """Return what is reported of evaluations whose draws don't follow the row."""
    return f"the values of evaluations aren't the same on other hardware or another evaluate.per_gpu: {reason}"


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
