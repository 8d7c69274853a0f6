"""What becomes of a start of the workers that has failed: whether there is another, and what is said and kept of it.

Torch-free.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, TextIO

from isobatch.conf.rundir.directory import Outcome, RunDir
from isobatch.conf.terminal import say
from isobatch.scaling.geometry import counted

Note = dict[str, Any]


def judged(error: Note, furthest: int, *, restarts_left: int = 1, over: bool = False) -> Note:
    """An error with ``retry``, whether the workers are to be started again; and where memory ran out with ``limit``.

    Not where that can't help, nor where the last start got no further than one before it. ``limit``, half the samples
    of a micro-batch, in whole granules, is for the next start, which doesn't count as a restart then; 0: there is no
    half, or it would be another run.

    Args:
        furthest: the step that a start before reached; -1: there was none.
        over: the run has ended, or was asked to stop.
    """
    retry = bool(error["again"] and not over)
    if error["kind"] == "oom":
        limit = 0 if error["fixed"] else _half(error)
        return error | {"limit": limit, "retry": retry and limit > 0}
    if retry and restarts_left > 0 and error["step"] <= furthest:
        cause = f"{error['cause']}; not started again, since the last start got no further than one before"
        return error | {"cause": cause, "retry": False}
    return error | {"retry": retry and restarts_left > 0}


def said(error: Note) -> str:
    """What the workers failed of, in a line."""
    if not error["again"] or error["silent"]:
        return str(error["cause"])
    what = "crashed"
    if error["kind"] == "oom":
        passing = f"with {counted(error['per_gpu'], 'sample')} in a pass"
        what = f"ran out of memory {passing if error['per_gpu'] else 'before the first pass'}"
    return f"rank {error['rank']} {what}: {error['cause']}"


def bury(error: Note, run: RunDir | None, attempt: str, restarts: int = 0, to: TextIO = sys.stderr) -> Outcome:
    """Say once what ended the run, and write it down where the run directory is this launch's."""
    cause, where = said(error), ""
    if error["kind"] == "oom":
        cause += f"; {_advice(error)}"
    if error["again"]:
        where = f"; traceback in {error['log']}" if "log" in error else ""
        if not where:
            say(error.get("traceback", ""), to, end="")
    say(f"isobatch: {cause}{where}", to)
    step, samples = error.get("step", 0), error.get("samples", 0)
    end = Outcome(error["kind"], cause, step, samples, attempt, restarts)
    if run:
        try:
            run.write_outcome(end)
            run.event(end.state, cause=cause, step=step, samples=samples, again=bool(error["again"]))
        except OSError as full:
            say(f"isobatch: {run.path} can't be written: {full}", to)
    return end


def note_restart(error: Note, run: RunDir, restart: int) -> None:
    """Keep what the ``restart``-th restart was for."""
    fields = {key: error[key] for key in ("rank", "cause", "step", "samples")}
    if "limit" in error:
        fields |= {"kind": "oom", "per_gpu_before": error["per_gpu"], "per_gpu": error["limit"]}
    with suppress(OSError):  # a full disk is no reason not to try again
        run.event("restart", **fields, restart=restart)


def _half(error: Note) -> int:
    """Half the samples of a micro-batch, of which some have to stay together; 0: there is no half."""
    return int(error["per_gpu"] // 2 // error["granule"] * error["granule"])


def _advice(error: Note) -> str:
    """What would work where memory ran out."""
    if half := _half(error):
        alone = (
            "numerics=bitwise can't go on with fewer samples in a pass; as a run of its own " if error["fixed"] else ""
        )
        return f"{alone}batch.per_gpu={half} needs less"
    smallest = "there is no smaller batch.per_gpu: " if error["per_gpu"] else ""
    return f"{smallest}a smaller model or more memory would do"
