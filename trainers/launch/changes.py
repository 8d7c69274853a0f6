"""Report what a finished run's result isn't of, when its command is given again. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from isobatch.conf.rundir.directory import RunDir
from isobatch.conf.rundir.files import events
from isobatch.conf.saved import not_applied
from isobatch.trainers.launch.source import changes

if TYPE_CHECKING:
    from isobatch.conf.schema import RunConfig


def differences(run: RunDir, config: RunConfig, code: dict[str, Any]) -> Iterator[str]:
    """Note and yield, in a line each, what the result shown isn't of: keys of this command, and today's code.

    Args:
        code: ``commit`` and ``repository`` of now.
    """
    if keys := not_applied(config, run.path):
        _note(run, "not_applied", keys=keys)
        yield f"not applied, since the run is finished: {', '.join(keys)}"
    if found := changes(run, config, code):
        _note(run, "changed", **found.fields)
        yield f"changed since the run was trained: {found}"


def _note(run: RunDir, event: str, **fields: Any) -> None:
    """Keep it in the events, once where it is the same again."""
    before = [one for one in events(run.path) if one.get("event") == event][-1:]
    if any(all(one.get(name) == value for name, value in fields.items()) for one in before):
        return
    with suppress(OSError):  # a full disk doesn't change the result
        run.event(event, **fields)
