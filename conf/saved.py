"""Write and read a run's ``config.yaml``, and derive the config that resumes the run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from isobatch.conf.identity import global_size_was_given
from isobatch.conf.keys import sections
from isobatch.conf.messages import shown
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_yaml

FORMAT = 1
# Of these nothing is taken from the stored config: they name the hardware and the wishes of the moment.
OF_THE_MOMENT = ("action", "output", "device", "debug", "cluster", "run", "plan", "report")


def dump(config: RunConfig) -> str:
    """Return the content of ``config.yaml``."""
    plain = {"format": FORMAT, **config.model_dump(mode="json", by_alias=True)}
    return yaml.safe_dump(plain, sort_keys=False, width=120)  # ASCII: yaml does not read all Unicode back


def load(file: Path) -> dict[str, Any]:
    """Return what ``dump`` wrote, as plain values; not checked against today's schema.

    Raises:
        UserError: the file can't be read, or isn't what ``dump`` writes.
    """
    try:
        plain = read_yaml(file)
    except (FileNotFoundError, Unreadable) as error:
        problem = f"{shown(str(file))} can't be read ({error})"
        raise UserError(problem, "fix it, or name another run.dir", "run.dir", str(file.parent)) from None
    if not isinstance(plain, dict) or not isinstance(plain.get("given"), list) or "format" not in plain:
        problem = f"{file} is damaged: it isn't the config of a run"
        raise UserError(problem, "fix it, or name another run.dir", "run.dir", str(file.parent))
    version = plain.pop("format")
    if version != FORMAT:
        problem = f"{file} has format {version!r:.20}, and this Isobatch reads format {FORMAT}"
        raise UserError(problem, "use the one that wrote it", "run.dir", str(file.parent))
    return {"chosen": {}, **plain}


def choices(stored: dict[str, Any], but: Collection[str] = OF_THE_MOMENT) -> dict[str, str]:
    """Return the choice of each group that the stored config was composed from, as far as its name tells."""
    named = {key: value.get("name") for key, value in stored.items() if isinstance(value, dict)}
    return {group: name for group, name in named.items() if isinstance(name, str) and group not in but}


def merge(
    defaults: dict[str, Any], stored: dict[str, Any], prefix: str = "", but: Collection[str] = OF_THE_MOMENT
) -> dict[str, Any]:
    """Merge ``stored`` over ``defaults``: keys of sections one by one, free mappings whole."""
    merged = dict(defaults)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        if key in but:
            continue
        before = defaults.get(name)
        both = isinstance(before, dict) and isinstance(value, dict) and key in sections()
        merged[name] = merge(before, value, f"{key}.", but) if both else value  # type: ignore[arg-type]
    return merged


def frozen(config: RunConfig, directory: Path) -> str:
    """Return the whole config of a run in ``directory``, as text, for a start of it later and elsewhere."""
    run = config.run.model_copy(update={"dir": str(directory.absolute()), "config": None, "new": False})
    return dump(config.model_copy(update={"run": run, "action": "train"}))


def resumed(was: RunConfig, given: set[str], fresh: dict[str, Any], another: bool = False) -> dict[str, Any]:
    """Return the plain config of ``was`` with the ``given`` keys as they are in ``fresh``.

    The global batch holds where it ruled; how it was dealt was for other hardware, except for a given ``per_gpu``.

    Args:
        another: it is for a run of its own, in which given sizes of the batch take the place of those there.
    """
    plain = was.model_dump(mode="json", by_alias=True)
    for key in given:
        _copy(key.split("."), fresh, plain)
    kept = {key for key in was.given if key.partition(".")[0] not in OF_THE_MOMENT} | given
    resized = another and "batch.global_size" in given
    if another and not resized and {"batch.per_gpu", "batch.accumulation"} <= given:
        kept.discard("batch.global_size")  # their product takes its place
    elif resized or global_size_was_given(was):
        if plain["batch"]["schedule"] is None:  # which says itself how large the batch is
            kept.add("batch.global_size")
        if plain["batch"]["per_gpu"] is not None and "batch.accumulation" not in given:
            plain["batch"]["accumulation"] = None
            kept.discard("batch.accumulation")
    return plain | {"given": sorted(kept)}


def not_applied(config: RunConfig, directory: Path) -> list[str]:
    """Return ``key=value`` for each given key whose value differs from that of the finished run in ``directory``.

    Hardware is left out, since the result would be the same.
    """
    now, then = config.model_dump(mode="json", by_alias=True), load(directory / "config.yaml")
    keys = [key for key in config.given if key.partition(".")[0] not in (*OF_THE_MOMENT, "given")]
    pairs = [(key, _value(key, now), _value(key, then)) for key in [*keys, *{"debug"} & {*config.given}]]
    return [f"{key}={shown(value)}" for key, value, before in pairs if value != before and (value or before)]


def _value(key: str, plain: Any) -> Any:
    """Return the value at a dotted key, of a group the name of its choice; None if there is none."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain.get("name") if isinstance(plain, dict) and "name" in plain else plain


def _copy(path: list[str], source: Any, target: Any) -> None:
    """Copy the value at ``path`` of ``source`` to ``target``; where there is none, delete it there."""
    *parents, last = path
    for name in parents:
        source = source.get(name, {}) if isinstance(source, dict) else {}
        target = target.setdefault(name, {}) if isinstance(target, dict) else {}
    if isinstance(source, dict) and last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)
