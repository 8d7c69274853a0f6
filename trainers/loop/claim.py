"""Taking the run directory: one launch at a time, one command on all machines, one disk under all of them."""

from __future__ import annotations

import json
import platform
import socket
from typing import TYPE_CHECKING, Any

import torch

from isobatch.conf.rundir.directory import Outcome, RunDir, hold, write_atomic
from isobatch.conf.rundir.files import last_step
from isobatch.conf.saved import begun, dump
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.results import WITHOUT_A_WORD
from isobatch.trainers.ranks.notes import restarts
from isobatch.trainers.ranks.world import World

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def enter(config: RunConfig, facts: dict[str, str], world: World) -> tuple[RunDir, Outcome | None]:
    """Take the run directory for this launch: rank 0 locks it and says ``running``, the others see that it did.

    What an earlier attempt left is not touched yet: this one may still be refused.

    Returns:
        The directory, and how the run had ended before: the same on all ranks where it was ``finished``.

    Raises:
        UserError: ranks were started with other configs, the folder isn't writable or no run's, another launch works in
            it, or a node doesn't see what rank 0 wrote there.
    """
    refuse_other_commands(config, world)
    run, before = RunDir(facts["run_dir"]), None
    hosts = world.gather(socket.gethostname())
    refusal = ""
    if world.rank == 0:
        try:
            before = _begin(run, config, facts, world, sorted(set(hosts)))
        except (UserError, OSError) as error:
            refusal = str(error) if isinstance(error, UserError) else f"run.dir={run.path} can't be written: {error}"
            if run.held:
                run.held.release()
    if refusal := world.agree(refusal):
        raise UserError(refusal)
    run.await_attempt(facts["attempt"])
    return run, before if world.rank == 0 else run.outcome()


def code_of(facts: dict[str, str]) -> dict[str, Any]:
    """Return ``commit`` of Isobatch and ``repository`` of the user, as they were when the command was given."""
    return {"commit": facts["commit"], "repository": json.loads(facts.get("repository", "null"))}


def refuse_unless_same(world: World, what: str, number: int) -> None:
    """Raises UserError, on all ranks, where ``number`` isn't the same on all of them."""
    found = world.gather(str(number))
    if len(set(found)) > 1:
        said = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(found))
        raise UserError(f"{what} differs between ranks: {said}; every rank has to open the whole data")


def refuse_other_source(files: dict[str, str], world: World) -> None:
    """Raise UserError, on all ranks, where one imported another version of a source file than rank 0 did.

    Args:
        files: path → hash.
    """
    theirs = json.loads(world.agree(json.dumps(files)))
    other = ", ".join(sorted(path for path in files.keys() & theirs.keys() if files[path] != theirs[path]))
    for rank, text in enumerate(world.gather(other)):
        if text:
            raise UserError(f"{text} on rank {rank} isn't what rank 0 has: use the same code on every machine")


def refuse_other_commands(config: RunConfig, world: World) -> None:
    """Raise UserError, on all ranks, where one was started for another run than rank 0 was.

    ``task.local`` and ``data.local`` may differ: paths and caches are a machine's own.
    """
    left_out = {"cluster": True, "run": True, "given": True, "task": {"local"}, "data": {"local"}}
    plain = config.model_dump(mode="json", by_alias=True, exclude=left_out)  # type: ignore[arg-type]
    mine = {f"{name}.{key}": value for name, section in plain.items() for key, value in _items(section)}
    theirs = json.loads(world.agree(json.dumps(mine)))
    other = [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
    said = ", ".join(f"{key.rstrip('.')}={mine.get(key)} (rank 0: {theirs.get(key)})" for key in other)
    for rank, text in enumerate(world.gather(said)):
        if text:
            raise UserError(f"rank {rank} was started with {text}; give the same command on every machine")


def _items(section: Any) -> list[tuple[str, Any]]:
    return list(section.items()) if isinstance(section, dict) else [("", section)]


def _begin(run: RunDir, config: RunConfig, facts: dict[str, str], world: World, hosts: list[str]) -> Outcome | None:
    """Rank 0's part; gives the outcome of the attempt before."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.refuse_foreign()
    launches = facts.get("launches", "").split()
    hold(run.lock(facts.get("job", ""), int(facts.get("job_restart", "0")), facts["attempt"], launches).file)
    before = run.outcome()
    if before and before.state == "finished" and "extends" not in facts:
        return before
    at = (before.step, before.samples) if before else (0, 0)
    if not begun(run.path):  # else what is there holds until this attempt trains, too
        write_atomic(run.path / "config.yaml", dump(config))
    run.write_outcome(Outcome("running", "", *at, facts["attempt"], restarts()))
    run.logs.mkdir(exist_ok=True)
    if before and before.state == "running" and before.attempt != facts["attempt"]:
        step = last_step(run.path)
        say(f"the last attempt {WITHOUT_A_WORD}, after step {step} or later")
        run.event("crashed", cause=WITHOUT_A_WORD, attempt=before.attempt, step=step, found=True)
    run.event(
        "start",
        command=facts["command"],
        **code_of(facts),
        attempt=facts["attempt"],
        restart=restarts(),
        new=before is None,
        hosts=facts["hosts"].split() if "hosts" in facts else hosts,
        **({"job": facts["job"], "job_restart": int(facts["job_restart"])} if "job" in facts else {}),
        world_size=world.size,
        device=str(world.device),
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )
    return before
