"""Compose YAML and overrides to one config by Hydra's compose API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isobatch.conf.keys import HERE, leaves
from isobatch.conf.overrides import for_hydra, given_by, no_such_choice, quoted, short
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import YAML_BYTES, Unreadable, check_yaml, read_text, read_yaml

PRIMARY = "config"
HEADER = r"^\s*#\s*@package\s+_global_\s*$"
BEGINS = "`# @package _global_`, then `defaults: [override /task: images]`"  # an experiment
# Settings of Hydra's own launcher, which isn't used here; without them composing takes half the time.
UNUSED = ("help", "hydra_help", "hydra_logging", "job_logging", "launcher", "output", "sweeper")


class Checked(FileConfigSource):
    """Read YAML files for Hydra, after a check that loading them takes little time and memory."""

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


def roots_with(config_dir: Path | str | None) -> list[Path]:
    """Return the folders that are searched for YAML."""
    return [HERE] if config_dir is None else [HERE, Path(config_dir).absolute()]


def layered(parsed: Sequence[Override], roots: Sequence[Path]) -> tuple[dict[str, Any], set[str]]:
    """Return the config as plain values, unchecked, and the keys that the overrides and their experiments give.

    Raises:
        UserError: a choice doesn't exist, or Hydra can't read or resolve something.
    """
    overrides = [for_hydra(override, roots) for override in parsed]
    for override in parsed:
        _refuse_headless(override, roots)
    overrides += [f"~hydra/{group}" for group in UNUSED]
    overrides += [f"hydra.searchpath=[{quoted(f'{Checked.scheme()}://{root}')}]" for root in roots[1:]]
    SourcesRegistry.instance().register(Checked)
    with _own_hydra():
        try:
            plain = OmegaConf.to_container(hydra_compose(PRIMARY, overrides), resolve=True)
            given = {key for override in parsed for key in given_by(override)}
            if any(override.key_or_group == "experiment" for override in parsed):
                given.update(_given_by_experiments(overrides, roots))
        except MissingConfigException as error:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            if error.options:
                raise no_such_choice(group, name, error.options, own=len(roots) > 1) from None
            raise _uncomposed(error, parsed) from None
        except OmegaConfBaseException as error:
            problem = f"{error.full_key}: {short(error)}" if error.full_key else short(error)
            raise UserError(problem, key=error.full_key or "") from None
        except RecursionError:
            raise UserError("values are nested too deep, or interpolations ${…} stand for each other") from None
        except (HydraException, yaml.YAMLError, ValueError, OSError) as error:
            raise _uncomposed(error, parsed) from None
    assert isinstance(plain, dict)
    return plain, given  # type: ignore[return-value]


def _refuse_headless(override: Override, roots: Sequence[Path]) -> None:
    """Raise UserError if an experiment's file lacks the header, without which its keys go to ``experiment.…``."""
    value = override.value()
    if override.key_or_group != "experiment" or override.package or value is None or isinstance(value, dict):
        return
    for name in value if isinstance(value, list) else [value]:
        file = next(path for root in roots if (path := root / f"experiment/{name}.yaml").is_file())
        with suppress(FileNotFoundError, Unreadable):  # Hydra reports it
            if not re.search(HEADER, read_text(file, YAML_BYTES), re.MULTILINE):
                raise UserError(f"{file} isn't an experiment", f"begin it with {BEGINS}", "experiment", name)


def _uncomposed(error: Exception, parsed: Sequence[Override]) -> UserError:
    """Return Hydra's error; if there is an experiment, with the form that one needs."""
    if all(override.key_or_group != "experiment" for override in parsed):
        return UserError(short(error))
    absent = re.match(r"In '(.*?)': Could not (?:override|find) '(.*?)'", short(error))
    problem = f"{absent[1]}.yaml names {absent[2]!r}, which doesn't exist" if absent else short(error)
    return UserError(problem, f"an experiment begins with {BEGINS}", "experiment")


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Let Hydra compose from our folder within; a caller's own ``@hydra.main`` is put back."""
    instance, base = GlobalHydra.instance(), VersionBase.instance()
    theirs, their_base = instance.hydra, base.getbase()
    instance.clear()
    try:
        with initialize_config_dir(str(HERE), job_name="isobatch", version_base="1.3"):
            yield
    finally:
        instance.hydra, base.version_base = theirs, their_base
        GlobalHydra.set_instance(instance)


def _given_by_experiments(overrides: list[str], roots: Sequence[Path]) -> Iterator[str]:
    """Yield the keys that the chosen experiments, and their parents, give, and the groups that they override."""
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
