"""Find out what is at a path that a config names: its own run, another run, weights, or nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from isobatch.conf.identity import digest, identity, run_directory, science, science_of, values
from isobatch.conf.messages import shown
from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.rundir.reading import metric_lines
from isobatch.conf.saved import load
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_json
from isobatch.scaling.stopping import rules_of
from isobatch.scaling.units import Duration

ABSENT: Any = object()  # the value of a key that isn't there, which null can be, too


def refuse_other_science(was: RunConfig, now: RunConfig, directory: str) -> None:
    """Reject ``now`` if it is another run than ``was``; a longer duration only extends a run.

    Raises:
        UserError: keys of the science differ; the message has them with both values.
    """
    before, after = science(was), science(now)
    changed = [key for key in sorted(before | after) if _differ(before.get(key), after.get(key))]
    if lengthens(was.duration, now.duration):
        changed = [key for key in changed if key != "duration"]
    if changed == ["duration"]:
        longer = replace(was.duration, value=2 * was.duration.value)
        problem = (
            f"run.dir={directory} has duration={was.duration}, which a longer one in the same unit extends (as "
            f"duration={longer}), and duration={now.duration} doesn't"
        )
        raise UserError(problem, "leave it out, or start a new run without run.dir", "duration", now.duration)
    if changed:
        there, here = values(was), values(now)
        given = [_differing(key, here.get(key), ABSENT if there.get(key) is None else there[key]) for key in changed]
        problem = f"run.dir={directory} holds another run, and can't resume with {', '.join(chain(*given))}"
        fix = "leave these keys out, or start a new run without run.dir"
        raise UserError(problem, fix, changed[0], after.get(changed[0]))


def _differ(one: Any, other: Any) -> bool:
    """Return whether two values differ in the hash of the identity. Python's 1, 1.0 and True are equal, but differ."""
    return digest({"value": one}) != digest({"value": other})


def _differing(key: str, now: Any, then: Any) -> list[str]:
    """Return the values that differ, each with its key: of a mapping only those entries."""
    if isinstance(now, dict) and isinstance(then, dict):
        pairs = {name: (now.get(name, ABSENT), then.get(name, ABSENT)) for name in {**now, **then}}
        found = {name: pair for name, pair in pairs.items() if ABSENT in pair or _differ(*pair)}
        return [text for name, pair in found.items() for text in _differing(f"{key}.{name}", *pair)]
    given = f"~{key}" if now is ABSENT else f"{key}={shown(now)}"
    return [f"{given} (the run has {'none' if then is ABSENT else shown(then)})"]


def lengthens(was: Duration, now: Duration) -> bool:
    """Return whether ``now`` is longer. Durations in different units can't be compared without the data."""
    return now.unit == was.unit and now.value > was.value


def lengthened(config: RunConfig, identity_there: str, duration_there: str) -> bool:
    """Return whether ``config`` is the run with this identity and duration, and extends it."""
    with suppress(ValueError):
        was = Duration.parse(duration_there)
        return lengthens(was, config.duration) and identity(config, was) == identity_there
    return False


def ever_trained(directory: Path) -> bool:
    """Return whether the run there ever trained. If it failed before, a corrected command may replace it."""
    return os.path.exists(directory / "plan.json")


def extends(directory: Path, config: RunConfig) -> bool:
    """Return whether ``config`` extends the run in ``directory``; False where there is no run.

    A longer duration extends a run, and other ``stop`` keys extend one that ended early. Neither does where the
    ``stop`` keys would end it at once.

    Raises:
        UserError: the directory can't be written to, or holds another run than ``config``'s, or the same one with
            another duration, where ``run.dir`` doesn't name it.
    """
    refuse_unwritable(directory)
    named = config.run.directory is not None and Path(os.path.expanduser(config.run.directory)) == directory
    if named and ever_trained(directory) and (length := _length(directory)):
        # the durations were compared when the config was composed from the one there
        return (length != config.duration or _ends_later(directory, config)) and not _is_over(directory, config)
    try:
        there = read_json(directory / "plan.json")["identity"]
    except FileNotFoundError:
        return False  # no run yet, or one that got nowhere
    except (Unreadable, KeyError, TypeError) as error:
        problem = f"{directory / 'plan.json'} is damaged ({error})"
        fix = "move it away, and the same command resumes from the checkpoints"
        raise UserError(problem, fix, "run.dir", str(directory)) from None
    if there == identity(config):
        return _ends_later(directory, config) and not _is_over(directory, config)
    if (length := _length(directory)) and there == identity(config, length):
        longer = lengthens(length, config.duration)
        way = f" duration={config.duration} extends it" if longer else " resumes that"
        problem = f"run directory {directory} holds this run with duration={length}, not {config.duration}"
        fix = f"run.dir={directory}{way}, run.new=true starts another beside it"
        raise UserError(problem, fix, "duration", config.duration)
    problem = f"run directory {directory} holds another run (identity {there}, not {identity(config)})"
    raise UserError(problem, "name another run.dir, or run.new=true", "run.dir", str(directory))


def _ends_later(directory: Path, config: RunConfig) -> bool:
    """Return whether the run in ``directory`` ended early, by other ``stop`` keys than those of ``config``."""
    ended = known_outcome(directory)
    if ended is None or ended.state != "finished":
        return False
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        steps, stop = read_json(directory / "plan.json")["steps"], load(directory / "config.yaml")["stop"]
        return steps is not None and ended.step < steps and stop != config.stop.model_dump(mode="json")
    return False


def _is_over(directory: Path, config: RunConfig) -> bool:
    """Return whether the run in ``directory`` has ended, and would end there by the ``stop`` keys of ``config``."""
    ended, stop = known_outcome(directory), config.stop
    rules = rules_of(stop.when, stop.patience, stop.min_delta, stop.at)
    if ended is None or ended.state != "finished" or not (rules or stop.after):
        return False
    lines = metric_lines(directory)
    time_s = max((line.get("time_s") or 0.0 for line in lines), default=0.0)
    evaluations = [line for line in lines if "loss" not in line]
    late = stop.after is not None and time_s >= 60 * stop.after.value
    return late or any(rule.cause(evaluations) for rule in rules)


def refuse_unwritable(directory: Path) -> None:
    """Raise UserError if ``directory`` neither is a folder that can be written to, nor can become one."""
    there = directory.absolute()
    while not os.path.exists(there):  # also where asking fails, as it does for names that are too long
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = f"run directory {directory}: {there} isn't a folder that can be written to"
        raise UserError(problem, "name a run.dir", "run.dir", str(directory))


def _length(directory: Path) -> Duration | None:
    """Return the duration of the run that a directory holds; None if that can't be read."""
    file = directory / "config.yaml"
    with suppress(ValueError):
        return Duration.parse(load(file).get("duration")) if os.path.exists(file) else None
    return None


def refuse_missing(weights: str) -> Path:
    """Return the path that ``init_from`` names. Raises UserError if nothing is there."""
    path = Path(os.path.expanduser(weights))
    if not os.path.exists(path):
        fix = "name a run directory, a checkpoint of one, or a .safetensors file"
        raise UserError(f"init_from={weights} doesn't exist", fix, "init_from", weights)
    return path


def tuning_directory(config: RunConfig) -> Path:
    """Return the folder of the results of ``action=tune``, in a run directory.

    That is ``run.dir``, else the run whose weights ``init_from`` names if it has the same recipe, else the run that the
    command would train.
    """
    run = None
    if config.init_from and not config.run.directory:
        run = run_of(refuse_missing(config.init_from))
    return (run if run and _same_recipe(run, config) else run_directory(config)) / "tune"


def _same_recipe(run: Path, config: RunConfig) -> bool:
    """Return whether a run has the science of ``config``, whatever weights either starts from."""
    was, now = science_of(load(run / "config.yaml")), science(config)
    return all(was.get(key) == now.get(key) for key in (was.keys() | now.keys()) - {"init_from", "format"})


def run_of(weights: Path) -> Path | None:
    """Return the directory of the run that wrote the weights, or None.

    Args:
        weights: the directory itself, its ``final/``, a checkpoint, or a file in one of these.
    """
    for path in (Path(os.path.abspath(weights)), weights.resolve()):
        folder = path.parent if path.is_file() else path
        inside = folder.parent if folder.name == "final" else folder.parent.parent
        run = inside if folder.name == "final" or folder.parent.name == "checkpoints" else path
        if os.path.isfile(run / "config.yaml"):
            return run
    return None
