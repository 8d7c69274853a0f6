"""From a command line to a RunConfig. The only file that knows Hydra: its compose API and its grammar of overrides."""

from __future__ import annotations

import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.explain import ConfigError, for_shell, leaves, nearest, unknown_key, validated
from conf.schema import RunConfig
from conf.stored import choices, going_on, load, over, refuse_other_science

HERE = Path(__file__).parent
PRIMARY = "config"


def compose(overrides: Sequence[str], config_dir: Path | str | None = None) -> RunConfig:
    """The config that ``overrides`` ask for, over the YAML here and in ``config_dir``.

    Where ``run.dir`` is given and holds a run, its config takes the place of the defaults.

    Raises:
        ConfigError: it can't be; the message says what was wrong, with its value, and what would work.
    """
    roots = [HERE] if config_dir is None else [HERE, Path(config_dir).absolute()]
    parsed = [_parse(text) for text in overrides]
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} is a sweep; did you mean -m? (a list is written [a,b], text in quotes 'a,b')"
            )
    values = {override.key_or_group: override.value() for override in parsed}
    file = Path(os.path.expanduser(str(values.get("run.dir")))) / "config.yaml"
    if values.get("run.dir") and not values.get("run.new") and os.path.exists(file):
        return _going_on(load(file), file, parsed, roots)
    plain, given = _composed(parsed, roots)
    return validated(plain | {"given": sorted(given)})


class Element(NamedTuple):
    """One run of a sweep: the overrides that vary in the sweep, with this run's values, and all of its overrides."""

    swept: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def column(self) -> dict[str, str]:
        """Key → value of what varies, for a table."""
        return {key: value for key, _, value in (override.partition("=") for override in self.swept)}


def expand(overrides: Sequence[str], config_dir: Path | str | None = None) -> list[Element]:
    """The runs of a sweep: every combination of the values that commas, ``range()`` and the like stand for.

    Raises:
        ConfigError: an override can't be read, or stands for no values.
    """
    roots = [HERE] if config_dir is None else [HERE, Path(config_dir).absolute()]
    choices_of = SimpleNamespace(get_group_options=lambda group, results_filter=None: _options(group, roots))
    ways: list[list[tuple[str, bool]]] = []
    for override in map(_parse, overrides):
        text = str(override.input_line)
        if not override.is_sweep_override():
            ways.append([(text, False)])
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{text}: an interval has no end of values; name them with commas, or range(from,to,step)"
            )
        override.config_loader = cast(Any, choices_of)  # all that glob() asks of it
        values = dict.fromkeys(override.sweep_string_iterator())
        if not values:
            raise ConfigError(f"{text} stands for no value at all")
        ways.append([(f"{override.get_key_element()}={value}", True) for value in values])
    return [
        Element(tuple(text for text, varies in way if varies), tuple(text for text, _ in way))
        for way in itertools.product(*ways)
    ]


def _going_on(stored: dict[str, Any], file: Path, parsed: list[Override], roots: Sequence[Path]) -> RunConfig:
    chosen = [f"{group}={name}" for group, name in choices(stored).items() if name in _options(group, roots)]
    as_stored = [_parse(text) for text in chosen]
    try:
        was = validated(over(_composed(as_stored, roots)[0], stored))
    except ConfigError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    fresh, given = _composed([*as_stored, *parsed], roots)
    given -= set(choices(stored)) - {override.key_or_group for override in parsed}
    now = validated(going_on(was, given, fresh))
    refuse_other_science(was, now, str(file.parent))
    return now


def _composed(parsed: Sequence[Override], roots: Sequence[Path]) -> tuple[dict[str, Any], set[str]]:
    """What Hydra makes of the overrides, as plain values, and the keys that they and their experiments give."""
    overrides = [_for_hydra(override, roots) for override in parsed]
    overrides += [f"hydra.searchpath=[{_quoted(f'file://{root}')}]" for root in roots[1:]]
    with initialize_config_dir(str(HERE), job_name="isobatch", version_base="1.3"):
        try:
            plain = OmegaConf.to_container(hydra_compose(PRIMARY, overrides), resolve=True)
            given = {key for override in parsed for key in _given(override)}
            if any(override.key_or_group == "experiment" for override in parsed):
                given.update(_given_by_experiments(overrides, roots))
        except MissingConfigException as error:
            raise ConfigError(_no_such_option(error)) from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {_short(error)}" if error.full_key else _short(error)) from None
        except (HydraException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(_short(error)) from None
    assert isinstance(plain, dict)
    return plain, given  # type: ignore[return-value]


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(_unparsable(text, error)) from None
    top = override.key_or_group.replace("/", ".").partition(".")[0]
    if top == "hydra":
        raise ConfigError(f"{text}: Hydra's own settings have no effect here; --help lists the keys there are")
    if top in ("", "given"):
        raise ConfigError(unknown_key(override.key_or_group or text))
    return override


def _unparsable(text: str, error: HydraException) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text!r} isn't key=value (or ~key); --help shows the command line"
    quoted = f"{key}={_quoted(value)}"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return f"{text!r} can't be read: {_short(error)}"
    return f"{text!r} can't be read as it stands; with quotes it is text: {for_shell(quoted)}"


def _quoted(text: str) -> str:
    """``text`` as one value of Hydra's grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def _options(group: str, roots: Sequence[Path]) -> list[str]:
    """Choices of a group; none where it isn't a group."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def _for_hydra(override: Override, roots: Sequence[Path]) -> str:
    """The override as Hydra is to hear it.

    Hydra wants ``++`` for keys that aren't there yet. It gets that for every key: what isn't there and shouldn't be,
    the schema finds, which knows what was meant.
    """
    text, value = str(override.input_line), override.value()
    options = _options(override.key_or_group, roots)
    if not options or isinstance(value, dict):
        return f"++{text}" if override.type is OverrideType.CHANGE and override.package is None else text
    if override.is_delete():
        return text
    if override.type is not OverrideType.CHANGE and (HERE / override.key_or_group).is_dir():
        raise ConfigError(f"{text}: {override.key_or_group} is there already; leave out the +: {text.lstrip('+')}")
    if value is None:
        return f"~{override.get_key_element()}"
    for name in value if isinstance(value, list) else [value]:
        files = [root / override.key_or_group / f"{name}.yaml" for root in roots]
        if ".." in str(name) or not any(file.is_file() for file in files):
            raise ConfigError(_no_such_choice(override.key_or_group, str(name), options))
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
                content = yaml.safe_load(next(file for file in files if file.is_file()).read_text()) or {}
                content.pop("defaults", None)
                yield from leaves(default.package or "", content)
    for group, override in found.overrides.override_metadata.items():
        if in_experiment(override.containing_config_path):
            yield group


def _given(override: Override) -> Iterator[str]:
    """Keys that an override gives: the group's name for a choice, the list's for one of its places."""
    if override.key_or_group != "experiment":
        yield from leaves(re.sub(r"\.\d+(\..*)?$", "", override.key_or_group), override.value())


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
    noise = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "provider=")
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return textwrap.shorten(" ".join(lines), 400, placeholder=" …")
