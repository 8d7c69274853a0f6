"""From a command line to a RunConfig. The only file that knows Hydra: its compose API and its grammar of overrides."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isobatch.conf.existing import begun, refuse_missing, refuse_other_science, run_of
from isobatch.conf.identity import housekeeping
from isobatch.conf.messages import (
    HERE,
    RECORDED,
    choices_of,
    for_shell,
    keys,
    leaves,
    nearest,
    quoted,
    shown,
    unknown_key,
    validated,
)
from isobatch.conf.saved import choices, load, merge, resumed
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import choose_optimizer
from isobatch.scaling.reading import MOST_DEPTH, YAML_BYTES, Unreadable, check_yaml, read_text, read_yaml

PRIMARY = "config"
MOST_VALUES = 3000  # of a list in an override: the time to parse it grows with their square
# Hydra's settings of its own launcher, which isn't used here: without them composing takes half the time.
UNUSED = ("help", "hydra_help", "hydra_logging", "job_logging", "launcher", "output", "sweeper")


class Checked(FileConfigSource):
    """Hydra's source of YAML files, which checks that loading one takes little time and memory."""

    @staticmethod
    def scheme() -> str:
        return "checked"

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        try:
            check_yaml(read_text(file, YAML_BYTES))
        except Unreadable as error:
            raise Unreadable(f"{file}: {error}") from None
        return super().load_config(config_path)


def compose(overrides: Sequence[str], config_dir: Path | str | None = None) -> RunConfig:
    """The config that ``overrides`` ask for; ``optimizer=auto`` is the optimizer that it chooses.

    Raises:
        UserError: it can't be; the message says what was wrong, with its value, and what would work.
    """
    try:
        return _compose(overrides, config_dir)
    except _OptimizerIsAutoError:
        others = [text for text in overrides if parse(text).key_or_group != "optimizer"]
        if any(parse(text).key_or_group == "run.dir" for text in others):
            with suppress(_OptimizerIsAutoError, UserError):
                if (config := _compose(others, config_dir)).chosen and not config.run.new:
                    return config  # it goes on, and the optimizer was chosen when it began
        shared = [text for text in others if not text.lstrip("+").startswith("optimizer.")]
        choice = choose_optimizer(_compose([*shared, "optimizer=sgd"], config_dir), roots_with(config_dir))
        try:
            config = _compose([*others, f"optimizer={choice.name}"], config_dir)
        except UserError as error:
            raise UserError(f"{error} (optimizer=auto chose {choice.name})") from None
        return config.model_copy(update={"chosen": {"optimizer": choice.why}})


class _OptimizerIsAutoError(Exception):
    """It can be chosen once the rest is known."""


def _compose(overrides: Sequence[str], config_dir: Path | str | None) -> RunConfig:
    """The config that ``overrides`` ask for, over the YAML here and in ``config_dir``.

    Where ``run.dir`` is given and holds a run, its config takes the place of the defaults; with ``run.new`` it may be
    changed, as another run is made of it. Where that run never came to train, a command that says what to train takes
    its place. ``action=evaluate`` takes the config of the run whose weights it is about,
    and whatever else is given on top.
    """
    roots = roots_with(config_dir)
    parsed = [parse(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(
                f"{shown(str(override.input_line))} is a sweep; did you mean -m? (a list is written [a,b], text in "
                "quotes 'a,b')"
            )
    values = {override.key_or_group: override.value() for override in parsed}
    if values.get("run.config"):
        return _frozen(Path(_resolved(values["run.config"])), parsed, roots)
    if values.get("action") != "evaluate" and (file := config_in_run_dir(values)):
        return _going_on(load(file), file, parsed, roots, another=bool(values.get("run.new")))
    plain, given = _composed(parsed, roots)
    if plain.get("action") == "evaluate" and (its_own := _evaluated(plain, given)):
        return _going_on(load(its_own), its_own, parsed, roots, another=True)
    return validated(plain | {"given": sorted(given), "chosen": {}})


def config_in_run_dir(values: Mapping[str, Any]) -> Path | None:
    """Return the file in ``run.dir`` that takes the place of the defaults; None where there is none.

    Args:
        values: of the overrides, by key.
    """
    if not values.get("run.dir"):
        return None
    file = Path(os.path.expanduser(_resolved(values["run.dir"]))) / "config.yaml"
    science = [key for key in values if not housekeeping(key.replace("/", "."))]
    return file if os.path.lexists(file) and (begun(file.parent) or not science) else None


def _resolved(value: Any) -> str:
    """A value as the config will have it, as far as that doesn't depend on other keys."""
    with suppress(OmegaConfBaseException):
        return str(OmegaConf.create({"value": value})["value"])
    return str(value)


def roots_with(config_dir: Path | str | None) -> list[Path]:
    """Where YAML is looked for."""
    return [HERE] if config_dir is None else [HERE, Path(config_dir).absolute()]


def _evaluated(plain: dict[str, Any], given: set[str]) -> Path | None:
    """The config of the run whose weights are to be evaluated; None where they are of no run."""
    weights = plain.get("init_from")
    if of_runs := sorted(key for key in given if key.startswith("run.")):
        directory = values.get("dir") if isinstance(values := plain["run"], dict) else None
        raise UserError(
            f"action=evaluate writes nothing, so it takes no {' or '.join(of_runs)}: "
            + ("leave it out" if weights else f"write init_from={directory or 'DIR'}, whose weights are evaluated")
        )
    if not isinstance(weights, str) or not weights:
        return None  # which the schema refuses
    run = run_of(refuse_missing(weights))
    return run and run / "config.yaml"


def _going_on(
    stored: dict[str, Any], file: Path, parsed: list[Override], roots: Sequence[Path], another: bool
) -> RunConfig:
    chosen = [f"{group}={name}" for group, name in choices(stored).items() if name in choices_of(group, roots)]
    as_stored = [parse(text) for text in chosen]
    try:
        was = validated(merge(_composed(as_stored, roots)[0], stored))
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    fresh, given = _composed([*as_stored, *parsed], roots)
    given -= set(choices(stored)) - {override.key_or_group for override in parsed}
    now = validated(resumed(was, given, fresh, another))
    if not another:
        refuse_other_science(was, now, str(file.parent))
    return now


def _frozen(file: Path, parsed: list[Override], roots: Sequence[Path]) -> RunConfig:
    """The config that a submission froze, whole; what is to be done with it is the command's."""
    allowed = ("action", "output", "run.config", "run.dir")
    if other := [override.key_or_group for override in parsed if override.key_or_group not in allowed]:
        raise UserError(f"run.config={file} is the whole config, which {', '.join(other)} can't change: leave it out")
    stored = load(file)
    chosen = choices(stored, but=()).items()
    as_stored = [parse(f"{group}={name}") for group, name in chosen if name in choices_of(group, roots)]
    fresh, _ = _composed([*as_stored, *parsed], roots)
    plain = merge(fresh, stored, but=("action", "output", "run"))
    try:
        return validated(plain | {"given": stored["given"], "chosen": stored["chosen"]})
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _composed(parsed: Sequence[Override], roots: Sequence[Path]) -> tuple[dict[str, Any], set[str]]:
    """What Hydra makes of the overrides, as plain values, and the keys that they and their experiments give."""
    overrides = [_for_hydra(override, roots) for override in parsed] + [f"~hydra/{group}" for group in UNUSED]
    overrides += [f"hydra.searchpath=[{quoted(f'{Checked.scheme()}://{root}')}]" for root in roots[1:]]
    SourcesRegistry.instance().register(Checked)
    with initialize_config_dir(str(HERE), job_name="isobatch", version_base="1.3"):
        try:
            plain = OmegaConf.to_container(hydra_compose(PRIMARY, overrides), resolve=True)
            given = {key for override in parsed for key in _given(override)}
            if any(override.key_or_group == "experiment" for override in parsed):
                given.update(_given_by_experiments(overrides, roots))
        except MissingConfigException as error:
            raise UserError(_no_such_option(error)) from None
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key}: {_short(error)}" if error.full_key else _short(error)) from None
        except RecursionError:
            raise UserError("values are nested too deep, or interpolations ${…} stand for each other") from None
        except (HydraException, yaml.YAMLError, ValueError, OSError) as error:
            raise UserError(_short(error)) from None
    assert isinstance(plain, dict)
    if isinstance(optimizer := plain.get("optimizer"), dict) and optimizer.get("name") == "auto":
        raise _OptimizerIsAutoError
    return plain, given  # type: ignore[return-value]


def parse(text: str) -> Override:
    """``key=value`` as Hydra reads it. Raises UserError."""
    _refuse_unending(text)
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(_unparsable(text, error)) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits
        raise UserError(f"{shown(text)!r} can't be read: {error!s:.200}") from None
    top = override.key_or_group.replace("/", ".").partition(".")[0]
    if top == "hydra":
        raise UserError(f"{text}: Hydra's own settings have no effect here; --help lists the keys there are")
    if top in ("", *RECORDED):
        raise UserError(unknown_key(override.key_or_group or text))
    if override.package == override.key_or_group.replace("/", "."):  # its own place, which needn't be said
        return parse(text.replace(f"@{override.package}", "", 1))
    return override


def _refuse_unending(text: str) -> None:
    """Raise UserError where Hydra's parser would recurse too deep, or take minutes."""
    depth = commas = 0
    for sign in re.sub(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", "", text):
        depth += (sign in "[{(") - (sign in "]})")
        commas += sign == "," and depth > 0
        if depth > MOST_DEPTH:
            raise UserError(f"{shown(text)!r} can't be read: its brackets are nested more than {MOST_DEPTH} deep")
        if commas > MOST_VALUES:
            raise UserError(
                f"{shown(text)!r} can't be read: a list on the command line has at most {MOST_VALUES:,} values; give "
                "it in a YAML of your own (--config-dir)"
            )


def _unparsable(text: str, error: HydraException) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{shown(text)!r} isn't key=value (or ~key); --help shows the command line"
    as_text = f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(as_text)
    except HydraException:
        return f"{shown(text)!r} can't be read: {_short(error)}"
    return f"{shown(text)!r} can't be read as it stands; with quotes it is text: {shown(for_shell(as_text))}"


def _for_hydra(override: Override, roots: Sequence[Path]) -> str:
    """The override as Hydra is to hear it.

    Hydra wants ``++`` for keys that aren't there yet. It gets that for every key: what isn't there and shouldn't be,
    the schema finds, which knows what was meant.
    """
    text, value, group = str(override.input_line), override.value(), override.key_or_group
    options, change = choices_of(group, roots), override.type is OverrideType.CHANGE
    if override.is_delete():
        if group in set(keys()):
            raise UserError(f"{text}: a key can be null where its comment says so, but not be deleted")
        return text
    if not options or isinstance(value, dict):
        return f"++{text}" if change and override.package is None else text
    if (HERE / group).is_dir():
        place = override.package
        if place and (change or place.partition(".")[0] not in set(keys())):
            raise UserError(f"{text}: no choice of {group} goes to {place}; use {group}={shown(value)}")
        if not place and not change:
            raise UserError(f"{text}: {group} is there already; leave out the +: {group}={shown(value)}")
    if value is None and group not in set(keys()):
        return f"~{override.get_key_element()}"
    for name in value if isinstance(value, list) else [value]:
        files = [root / group / f"{name}.yaml" for root in roots]
        if ".." in str(name) or not any(os.path.isfile(file) for file in files):
            raise UserError(_no_such_choice(group, shown(name), options))
    return text


def _no_such_choice(group: str, name: str, options: Sequence[str]) -> str:
    return f"there is no {group}={name}{nearest(name, options) or ';'} {group} can be {', '.join(options)}"


def _given_by_experiments(overrides: list[str], roots: Sequence[Path]) -> Iterator[str]:
    """Keys in the experiments that were chosen and in what they inherit from; groups whose choice they override."""
    found = GlobalHydra.instance().config_loader().compute_defaults_list(PRIMARY, overrides, RunMode.RUN)
    parents = {default.config_path: default.parent for default in found.defaults}

    def in_experiment(path: str | None) -> bool:
        return path is not None and (path.startswith("experiment/") or in_experiment(parents.get(path)))

    for default in found.defaults:
        if in_experiment(default.config_path):
            group = default.config_path.rpartition("/")[0]
            if default.package and default.package == group.replace("/", "."):
                yield default.package
            else:
                files = [root / f"{default.config_path}.yaml" for root in roots]
                content = read_yaml(next(file for file in files if file.is_file())) or {}
                content.pop("defaults", None)
                yield from leaves(default.package or "", content)
    for group, override in found.overrides.override_metadata.items():
        if in_experiment(override.containing_config_path):
            yield group


def _given(override: Override) -> Iterator[str]:
    """Keys that an override gives: the group's name for a choice, the list's for one of its places."""
    if override.key_or_group != "experiment":
        key = override.package or override.key_or_group
        yield from leaves(re.sub(r"\.\d+(\..*)?$", "", key), override.value())


def _no_such_option(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if error.options:
        return _no_such_choice(group, name, error.options)
    return _short(error)


def _short(error: Exception) -> str:
    """What Hydra or OmegaConf say, in one line."""
    said = str(error) or str(error.__cause__)
    if match := re.search(r"Could not append to config. An item is already at '(.*)'", said):
        return f"{match[1]} is there already; leave out the +"
    if match := re.search(r"Could not delete from config. '(.*)' does not exist", said):
        return f"~{match[1]}: there is no value to delete; a key that is off is null"
    if match := re.search(r"Interpolation key '(.*)' not found", said):
        return f"${{{match[1]}}} names no key of the config; as text it is \\${{{match[1]}}}"
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "provider=")
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return textwrap.shorten(" ".join(lines), 400, placeholder=" …")
