"""A run's config as its run directory holds it (``config.yaml``), and going on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from conf.explain import ConfigError, sections, shown
from conf.identity import global_size_rules, science
from conf.schema import RunConfig

FORMAT = 1
# Of these nothing is taken from the stored config: they name the hardware and the wishes of the moment.
OF_THE_MOMENT = ("action", "output", "device", "debug", "cluster", "run", "plan")


def dump(config: RunConfig) -> str:
    """The content of ``config.yaml``."""
    plain = {"format": FORMAT, **config.model_dump(mode="json", by_alias=True)}
    return yaml.safe_dump(plain, sort_keys=False, width=120)  # ASCII: yaml does not read all Unicode back


def load(file: Path) -> dict[str, Any]:
    """What ``dump`` wrote, as plain values; not checked against today's schema.

    Raises:
        ConfigError: it can't be read, or isn't what ``dump`` writes.
    """
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{file} can't be read ({first}); mend it, or name another run.dir") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("given"), list) or "format" not in plain:
        raise ConfigError(f"{file} is damaged: it isn't the config of a run; mend it, or name another run.dir")
    version = plain.pop("format")
    if version != FORMAT:
        raise ConfigError(
            f"{file} has format {version!r}, and this Isobatch reads format {FORMAT}; use the one that wrote it"
        )
    return plain


def choices(stored: dict[str, Any]) -> dict[str, str]:
    """Group → the choice that the stored config was composed from, as far as its name tells."""
    named = {key: value.get("name") for key, value in stored.items() if isinstance(value, dict)}
    return {group: name for group, name in named.items() if isinstance(name, str) and group not in OF_THE_MOMENT}


def over(defaults: dict[str, Any], stored: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``stored`` over ``defaults``; keys of sections are merged, free mappings are taken whole."""
    merged = dict(defaults)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        if key in OF_THE_MOMENT:
            continue
        before = defaults.get(name)
        both = isinstance(before, dict) and isinstance(value, dict) and key in sections()
        merged[name] = over(before, value, f"{key}.") if both else value  # type: ignore[arg-type]
    return merged


def going_on(was: RunConfig, given: set[str], fresh: dict[str, Any], another: bool = False) -> dict[str, Any]:
    """The plain config of ``was`` with the ``given`` keys as they are in ``fresh``.

    The global batch holds where it ruled; how it was dealt was for other hardware, but for a given ``per_gpu``.

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
    elif resized or global_size_rules(was):
        kept.add("batch.global_size")
        if plain["batch"]["per_gpu"] is not None and "batch.accumulation" not in given:
            plain["batch"]["accumulation"] = None
            kept.discard("batch.accumulation")
    return plain | {"given": sorted(kept)}


def refuse_other_science(was: RunConfig, now: RunConfig, directory: str) -> None:
    """Raises ConfigError, naming the keys with both values, where ``now`` is another run than ``was``."""
    before, after = science(was), science(now)
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    if changed:
        values = ", ".join(f"{key}={shown(after.get(key))} (there {shown(before.get(key))})" for key in changed)
        raise ConfigError(
            f"run.dir={directory} holds another run; it can't go on with {values}: leave these keys out, "
            "or start a new run without run.dir"
        )


def _copy(path: list[str], source: Any, target: Any) -> None:
    """The value at ``path`` of ``source`` to ``target``; where there is none, it is deleted there."""
    *parents, last = path
    for name in parents:
        source = source.get(name, {}) if isinstance(source, dict) else {}
        target = target.setdefault(name, {}) if isinstance(target, dict) else {}
    if isinstance(source, dict) and last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)
