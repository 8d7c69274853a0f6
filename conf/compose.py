"""Compose a RunConfig from overrides; where ``run.dir`` holds a run, its config replaces the defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isobatch.conf.existing import ever_trained, refuse_missing, refuse_other_science, run_of
from isobatch.conf.hardware import runs_at_a_time
from isobatch.conf.identity import housekeeping
from isobatch.conf.keys import choices_of
from isobatch.conf.layers import layered, roots_with
from isobatch.conf.messages import shown, validated
from isobatch.conf.overrides import parse
from isobatch.conf.saved import choices, load, merge, resumed
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError

SAYS_WHAT_TO_TRAIN = {"task", "task._target_", "experiment"}
OF_NO_RUN = ("evaluate", "runs", "report")  # actions that don't take their config from run.dir
DECAYS_USING = {
    "lr.final": ("cosine", "linear", "polynomial", "wsd"),
    "lr.exponent": ("polynomial",),
    "lr.milestones": ("step",),
    "lr.gamma": ("step",),
    "lr.cooldown": ("wsd",),
}
MOST_NAMES, MOST_NEAR = 2000, 3  # that are compared in one folder, and named in a message


def compose(overrides: Sequence[str], config_dir: Path | str | None = None) -> RunConfig:
    """Return the config that ``overrides`` ask for, over the YAML here and in ``config_dir``.

    Where ``run.dir`` holds a run, its config replaces the defaults; with ``run.new`` it may be changed, which makes a
    new run. If that run never trained a step, a command that names a task replaces it. ``action=evaluate`` and
    ``tune`` use the config of the run whose weights ``init_from`` names; ``tune`` doesn't if the command names a task,
    so that it measures what the command would train from these weights. The optimizer may still be ``auto``, which
    ``scaling.planning.automatic.configured`` settles.

    Raises:
        UserError: an override, a choice or a value isn't valid.
    """
    roots = roots_with(config_dir)
    parsed = [parse(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override():
            problem = f"{shown(str(override.input_line))} is a sweep"
            raise UserError(problem, "did you mean -m? (a list is written [a,b], text in quotes 'a,b')")
    values = {override.key_or_group: override.value() for override in parsed}
    if values.get("run.config"):
        return _frozen(Path(_resolved(values["run.config"])), parsed, roots)
    if values.get("action") not in OF_NO_RUN and (file := _config_in_run_dir(values)):
        return _resumed(load(file), file, parsed, roots, another=bool(values.get("run.new")))
    plain, given = layered(parsed, roots)
    if plain.get("action") in ("evaluate", "tune") and (its_own := _measured(plain, given)):
        return _resumed(load(its_own), its_own, parsed, roots, another=True)
    return validated(plain | {"given": sorted(given), "chosen": {}})


def unused_keys(overrides: Sequence[str], config: RunConfig) -> list[str]:
    """Return a warning for each given key without effect, as what uses it isn't asked for.

    There are none for a config that was stored, since its run has the identity that they change.
    """
    values = {override.key_or_group: override.value() for override in map(parse, overrides)}
    stored = config.run.config or (not config.run.new and _config_in_run_dir(values))
    if stored or config.action not in ("train", "plan"):
        return []
    decay, when = config.lr.decay, config.stop.when
    unused = {
        key: f"lr.decay={' or '.join(users)}, and lr.decay is {decay}"
        for key, users in DECAYS_USING.items()
        if decay not in users
    }
    unused |= {} if when else dict.fromkeys(("stop.patience", "stop.min_delta"), "stop.when, and stop.when is null")
    unused |= {} if config.search.parallel == runs_at_a_time(config) else {"search.parallel": "a sweep (-m)"}
    return [f"{key} is only used by {users}" for key, users in unused.items() if key in config.given]


def _config_in_run_dir(values: Mapping[str, Any]) -> Path | None:
    """Return the file in ``run.dir`` that replaces the defaults, or None.

    Args:
        values: of the overrides, by key.
    """
    if not values.get("run.dir"):
        return None
    file = Path(os.path.expanduser(_resolved(values["run.dir"]))) / "config.yaml"
    science = [key for key in values if not housekeeping(key.replace("/", "."))]
    return file if os.path.lexists(file) and (ever_trained(file.parent) or not science) else None


def _resolved(value: Any) -> str:
    """Return a value with its interpolations resolved, unless they name other keys."""
    with suppress(OmegaConfBaseException):
        return str(OmegaConf.create({"value": value})["value"])
    return str(value)


def _measured(plain: dict[str, Any], given: set[str]) -> Path | None:
    """Return the config file of the run whose weights are evaluated or tuned, or None if they belong to no run."""
    weights = plain.get("init_from")
    of_runs = sorted(key for key in given if key.startswith("run."))
    if of_runs and plain["action"] == "evaluate":
        directory = values.get("dir") if isinstance(values := plain["run"], dict) else None
        problem = f"action=evaluate writes nothing, so it takes no {' or '.join(of_runs)}"
        instead = f"write init_from={directory or 'DIR'}, whose weights are evaluated"
        raise UserError(problem, "leave it out" if weights else instead, of_runs[0], directory)
    if not isinstance(weights, str) or not weights:
        return None  # the schema rejects it
    if plain["action"] == "tune" and given & SAYS_WHAT_TO_TRAIN:
        return None
    run = run_of(refuse_missing(weights))
    return run and run / "config.yaml"


def _resumed(
    stored: dict[str, Any], file: Path, parsed: list[Override], roots: Sequence[Path], another: bool
) -> RunConfig:
    chosen = [f"{group}={name}" for group, name in choices(stored).items() if name in choices_of(group, roots)]
    as_stored = [parse(text) for text in chosen]
    was = _stored(merge(layered(as_stored, roots)[0], stored), file)
    fresh, given = layered([*as_stored, *parsed], roots)
    given -= set(choices(stored)) - {override.key_or_group for override in parsed}
    if fresh["optimizer"]["name"] == "auto" and was.chosen and not another:
        given.discard("optimizer")  # it was chosen when the run began
    now = validated(resumed(was, given, fresh, another))
    if not another and now.optimizer.name != "auto":
        refuse_other_science(was, now, str(file.parent))
    return now


def _frozen(file: Path, parsed: list[Override], roots: Sequence[Path]) -> RunConfig:
    """Return the config that a submission froze; the command only says what to do with it."""
    allowed = ("action", "output", "run.config", "run.dir")
    if other := [override.key_or_group for override in parsed if override.key_or_group not in allowed]:
        problem = f"run.config={file} is the whole config, which {', '.join(other)} can't change"
        raise UserError(problem, "leave it out", other[0])
    stored = load(file)
    chosen = choices(stored, but=()).items()
    as_stored = [parse(f"{group}={name}") for group, name in chosen if name in choices_of(group, roots)]
    fresh, _ = layered([*as_stored, *parsed], roots)
    plain = merge(fresh, stored, but=("action", "output", "run"))
    return _stored(plain | {"given": stored["given"], "chosen": stored["chosen"]}, file)


def _stored(plain: dict[str, Any], file: Path) -> RunConfig:
    """Return what ``file`` holds as a RunConfig. Raises UserError if it isn't one."""
    try:
        return validated(plain)
    except UserError as error:
        raise UserError(f"{file} is damaged: {error.problem}", error.fix, error.key, error.value) from None


def refuse_typo(overrides: Sequence[str], config: RunConfig) -> None:
    """Raise UserError if ``run.dir`` holds no run to resume and the command doesn't say what to train there."""
    if not config.run.directory or config.run.config or config.action not in ("train", "plan", "tune"):
        return
    values = {override.key_or_group: override.value() for override in map(parse, overrides)}
    if _config_in_run_dir(values) or values.keys() & SAYS_WHAT_TO_TRAIN:
        return
    near = _nearest_runs(Path(os.path.expanduser(config.run.directory)))
    hint = f"did you mean {' or '.join(map(str, near))}? " if near else ""
    raise UserError(
        f"run.dir={config.run.directory} holds no run to resume",
        f"{hint}a new run there needs its task, too: task=…, task._target_=… or experiment=…",
        "run.dir",
        config.run.directory,
    )


def _nearest_runs(directory: Path) -> list[Path]:
    """Return runs beside ``directory`` and in ``runs/`` whose names are like its own."""
    found: dict[str, Path] = {}
    for folder in (directory.parent, Path("runs")):
        with suppress(OSError), os.scandir(folder) as entries:
            found |= {entry.name: folder / entry.name for entry in islice(entries, MOST_NAMES)}
    near = [found[name] for name in get_close_matches(directory.name, found, n=3 * MOST_NEAR)]
    return [run for run in near if (run / "config.yaml").is_file()][:MOST_NEAR]
