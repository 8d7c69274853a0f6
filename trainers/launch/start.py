"""Start this machine's workers, and end with the command's exit code. Torch-free until used."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from isobatch.trainers.launch.failures import record_end
from isobatch.trainers.launch.worker import Body
from isobatch.trainers.ranks.failure import Failure
from isobatch.trainers.ranks.session import Start
from isobatch.trainers.ranks.signals import Stop, Stopped

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def launch(config: RunConfig, start: Start, body: Body, stop: Stop) -> int:
    """Train with this machine's workers; say once what went wrong.

    Args:
        body: from a module that was imported after ``import_torch``: the workers are forked with it.

    Returns:
        The command's exit code.

    Raises:
        UserError: it can't work, and nothing was started.
    """
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError

    from isobatch.trainers.engines.make import import_engine
    from isobatch.trainers.launch.agent import Agent
    from isobatch.trainers.launch.rendezvous import rendezvous

    import_engine(config)
    cluster, handler, agent = config.cluster, None, None
    cause, stopped = "rank 0 ended without a result", ""
    try:
        handler, address = rendezvous(config, stop, start.hosts, start.host)
        agent = Agent(config, start, body, stop, handler, address)
        agent.run()
        if agent.end:
            return agent.end.exit_code
        cause = cause if agent.leads else "the machine of rank 0 is gone"
    except Stopped as wish:
        stopped = f"{wish}, while waiting for other machines"
    except RendezvousError as error:
        late = isinstance(error, RendezvousTimeoutError)
        other = f"not all {cluster.nodes} came within {cluster.timeout_s:g} s" if late else type(error).__name__
        where = getattr(cluster, "rendezvous", None)
        cause = f"the machines didn't meet at cluster.rendezvous={where}: {str(error) or other}"
    finally:
        if handler:
            handler.shutdown()
    failure = agent.verdict.failure if agent and agent.verdict else Failure(0, cause, again=False)
    if stopped:
        failure = replace(failure, kind="stopped", again=False, cause=stopped)
    run = agent.run_dir if agent and agent.leads else None
    return record_end(failure, run, start.attempt, agent.restarts if agent else 0).exit_code
