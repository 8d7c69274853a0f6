"""A run's config as its run directory holds it (``config.yaml``), and going on from it."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from isobatch.conf.identity import OFF, global_size_rules, identity, science
from isobatch.conf.messages import sections, shown
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_json, read_yaml
from isobatch.scaling.units import Duration

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
        UserError: it can't be read, or isn't what ``dump`` writes.
    """
    try:
        plain = read_yaml(file)
    except (FileNotFoundError, Unreadable) as error:
        raise UserError(f"{shown(str(file))} can't be read ({error}); mend it, or name another run.dir") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("given"), list) or "format" not in plain:
        raise UserError(f"{file} is damaged: it isn't the config of a run; mend it, or name another run.dir")
    version = plain.pop("format")
    if version != FORMAT:
        raise UserError(
            f"{file} has format {version!r:.20}, and this Isobatch reads format {FORMAT}; use the one that wrote it"
        )
    return {"chosen": {}, **plain}


def choices(stored: dict[str, Any], but: Collection[str] = OF_THE_MOMENT) -> dict[str, str]:
    """Group → the choice that the stored config was composed from, as far as its name tells."""
    named = {key: value.get("name") for key, value in stored.items() if isinstance(value, dict)}
    return {group: name for group, name in named.items() if isinstance(name, str) and group not in but}


def over(
    defaults: dict[str, Any], stored: dict[str, Any], prefix: str = "", but: Collection[str] = OF_THE_MOMENT
) -> dict[str, Any]:
    """``stored`` over ``defaults``; keys of sections are merged, free mappings are taken whole."""
    merged = dict(defaults)
    for name, value in stored.items():
        key = f"{prefix}{name}"
        if key in but:
            continue
        before = defaults.get(name)
        both = isinstance(before, dict) and isinstance(value, dict) and key in sections()
        merged[name] = over(before, value, f"{key}.", but) if both else value  # type: ignore[arg-type]
    return merged


def frozen(config: RunConfig, directory: Path) -> str:
    """The whole config of a run that is to work in ``directory``, for a start of it later and elsewhere."""
    run = config.run.model_copy(update={"dir": str(directory.absolute()), "config": None, "new": False})
    return dump(config.model_copy(update={"run": run, "action": "train"}))


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
        if plain["batch"]["schedule"] is None:  # which says itself how large the batch is
            kept.add("batch.global_size")
        if plain["batch"]["per_gpu"] is not None and "batch.accumulation" not in given:
            plain["batch"]["accumulation"] = None
            kept.discard("batch.accumulation")
    return plain | {"given": sorted(kept)}


def refuse_other_science(was: RunConfig, now: RunConfig, directory: str) -> None:
    """Raises UserError, naming the keys with both values, where ``now`` is another run than ``was``.

    A longer duration isn't another run: it extends this one.
    """
    before, after = science(was), science(now)
    longer = lengthens(was.duration, now.duration)
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    changed = [key for key in changed if not (key == "duration" and longer)]
    if changed == ["duration"]:
        raise UserError(
            f"run.dir={directory} has duration={was.duration}, which a longer one in the same unit extends (as "
            f"duration={replace(was.duration, value=2 * was.duration.value)}), and duration={now.duration} doesn't: "
            "leave it out, or start a new run without run.dir"
        )
    if changed:
        sides = [(key, *(shown(side.get(key, OFF.get(key))) for side in (after, before))) for key in changed]
        values = ", ".join(f"{key}={value} (there {there})" for key, value, there in sides)
        raise UserError(
            f"run.dir={directory} holds another run; it can't go on with {values}: leave these keys out, "
            "or start a new run without run.dir"
        )


def lengthens(was: Duration, now: Duration) -> bool:
    """Whether ``now`` is longer. In another unit that isn't known before the data is opened, so there it isn't."""
    return now.unit == was.unit and now.value > was.value


def lengthened(config: RunConfig, identity_there: str, duration_there: str) -> bool:
    """Whether ``config`` is of the run that had this identity with this duration, and makes it longer."""
    with suppress(ValueError):
        was = Duration.parse(duration_there)
        return lengthens(was, config.duration) and identity(config, was) == identity_there
    return False


def begun(directory: Path) -> bool:
    """Whether a run there came to train; one that failed before may be put right, and is another one then."""
    return os.path.exists(directory / "plan.json")


def extends(directory: Path, config: RunConfig) -> bool:
    """Whether ``config`` makes the run in ``directory`` longer; where there is none, nothing is.

    Raises:
        UserError: the directory can't be written to, or holds another run than ``config``'s, or the same one with
            another duration, where ``run.dir`` doesn't name it.
    """
    refuse_unwritable(directory)
    named = config.run.dir is not None and Path(os.path.expanduser(config.run.dir)) == directory
    if named and begun(directory) and (length := _length(directory)):
        return length != config.duration  # they were compared when the config was composed from the one there
    try:
        there = read_json(directory / "plan.json")["identity"]
    except FileNotFoundError:
        return False  # no run yet, or one that got nowhere
    except (Unreadable, KeyError, TypeError) as error:
        raise UserError(
            f"{directory / 'plan.json'} is damaged ({error}): move it away, and the same command resumes from the "
            "checkpoints"
        ) from None
    if there == identity(config):
        return False
    if (length := _length(directory)) and there == identity(config, length):
        longer = lengthens(length, config.duration)
        way = f" duration={config.duration} extends it" if longer else " goes on with that"
        raise UserError(
            f"run directory {directory} holds this run with duration={length}, not {config.duration}: "
            f"run.dir={directory}{way}, run.new=true starts another beside it"
        )
    raise UserError(
        f"run directory {directory} holds another run (identity {there}, not {identity(config)}); name another "
        "run.dir, or run.new=true"
    )


def not_applied(config: RunConfig, directory: Path) -> list[str]:
    """Return ``key=value`` of the given keys that are other than those of the finished run in ``directory``.

    On other hardware it would be the same result; so that isn't among them.
    """
    now, then = config.model_dump(mode="json", by_alias=True), load(directory / "config.yaml")
    keys = [key for key in config.given if key.partition(".")[0] not in (*OF_THE_MOMENT, "given")]
    pairs = [(key, _value(key, now), _value(key, then)) for key in [*keys, *{"debug"} & {*config.given}]]
    return [f"{key}={shown(value)}" for key, value, before in pairs if value != before and (value or before)]


def _value(key: str, plain: Any) -> Any:
    """Return the value at a dotted key, of a group the name of its choice; None where there is none."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain.get("name") if isinstance(plain, dict) and "name" in plain else plain


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where ``directory`` neither is a folder that can be written to, nor can become one."""
    there = directory.absolute()
    while not os.path.exists(there):  # also where asking fails, as it does for names that are too long
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run directory {directory}: {there} isn't a folder that can be written to; name a run.dir")


def _length(directory: Path) -> Duration | None:
    """The duration of the run that a directory holds; None where that can't be read."""
    file = directory / "config.yaml"
    with suppress(ValueError):
        return Duration.parse(load(file).get("duration")) if os.path.exists(file) else None
    return None


def refuse_missing(weights: str) -> Path:
    """The path that ``init_from`` names. Raises UserError where nothing is there."""
    path = Path(os.path.expanduser(weights))
    if not os.path.exists(path):
        raise UserError(
            f"init_from={weights} isn't there; name a run directory, a checkpoint of one, or a .safetensors file"
        )
    return path


def run_of(weights: Path) -> Path | None:
    """The directory of the run that weights are of: itself, or that of its ``final/``, of a checkpoint, or of a file in
    one of these. None where they are of no run."""
    for path in (Path(os.path.abspath(weights)), weights.resolve()):
        folder = path.parent if path.is_file() else path
        inside = folder.parent if folder.name == "final" else folder.parent.parent
        run = inside if folder.name == "final" or folder.parent.name == "checkpoints" else path
        if os.path.isfile(run / "config.yaml"):
            return run
    return None


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
