"""Expand a sweep to its runs and their directories."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from hydra.core.override_parser.types import Override, RangeSweep

from isobatch.conf.identity import digest, first_free, science
from isobatch.conf.keys import choices_of
from isobatch.conf.layers import roots_with
from isobatch.conf.messages import shown
from isobatch.conf.overrides import parse
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_json

MOST_RUNS = 10_000
OF_THE_WHOLE = ("action", "output", "debug", "search.parallel", "run.dir", "run.name", "run.new")


class Element(NamedTuple):
    """Describe one run of a sweep: the overrides that vary, with its values, and all of its overrides."""

    swept: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def column(self) -> dict[str, str]:
        """Return key → value of the overrides that vary, for a table."""
        return {key: value for key, _, value in (override.partition("=") for override in self.swept)}


def expand(overrides: Sequence[str], config_dir: Path | str | None = None) -> list[Element]:
    """Return the runs of a sweep: every combination of the values that commas, ``range()`` and the like give.

    Raises:
        UserError: an override can't be read, or stands for no values.
    """
    roots = roots_with(config_dir)
    loader = SimpleNamespace(get_group_options=lambda group, results_filter=None: choices_of(group, roots))
    ways: list[list[tuple[str, bool]]] = []
    for override in map(parse, overrides):
        text = str(override.input_line)
        if not override.is_sweep_override():
            ways.append([(text, False)])
            continue
        if not override.is_discrete_sweep():
            problem = f"{shown(text)}: an interval has no end of values"
            raise UserError(problem, "name them with commas, or range(from,to,step)", override.key_or_group)
        override.config_loader = cast(Any, loader)  # all that glob() asks of it
        values = _values(override, text)
        ways.append([(f"{override.get_key_element()}={value}", True) for value in values])
    if (runs := math.prod(map(len, ways))) > MOST_RUNS:
        raise UserError(f"the sweep stands for {runs:,} runs, and can be of at most {MOST_RUNS:,}", "give fewer values")
    return [
        Element(tuple(text for text, varies in way if varies), tuple(text for text, _ in way))
        for way in itertools.product(*ways)
    ]


def _values(override: Override, text: str) -> list[str]:
    """Return the values of a swept key, each once."""
    key, values = override.key_or_group, override.value()
    too_many = UserError(f"{shown(text)} stands for more than {MOST_RUNS:,} runs", "give fewer values", key)
    if isinstance(values, RangeSweep):  # counted first, as a shuffled one is made whole
        start, stop, step = (float(number or 0) for number in (values.start, values.stop, values.step))
        if step == 0 or not all(map(math.isfinite, (start, stop, step))):
            raise UserError(f"{shown(text)} has no end of values", "give range(from,to,step) with another step", key)
        if (stop - start) / step > MOST_RUNS:
            raise too_many
    found = list(dict.fromkeys(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1)))
    if not found:
        raise UserError(f"{text} stands for no values", key=key)
    if len(found) > MOST_RUNS:
        raise too_many
    return found


def sweep_directories(configs: Sequence[RunConfig], swept: Sequence[Sequence[str]]) -> list[Path]:
    """Return the directories of a sweep's runs: ``runs/<sweep>/<overrides>``.

    The sweep's name is a hash of what all its runs share, so that more values of the same keys land beside earlier
    ones. The overrides are in the order of their keys. A run that the sweep's folder already holds under another name
    keeps its directory.

    Args:
        swept: of each run the overrides that vary, as they are written on the command line.

    Raises:
        UserError: the runs differ in what has to be one for all of them, are no runs, or a run lives where the sweep
            should.
    """
    if not swept[0]:
        raise UserError("-m is a sweep, and no key has several values", "give two values, such as seed=1,2")
    keys = tuple(map(_key, swept[0]))
    for key in OF_THE_WHOLE:
        if len({attrgetter(key)(config) for config in configs}) > 1:
            raise UserError(f"{key} must be the same in the whole sweep", "give it one value", key)
    if (action := configs[0].action) not in ("train", "plan", "tune"):
        fix = f"give action={action} without it"
        raise UserError("-m is a sweep of runs that are trained, planned or tuned", fix, "action", action)
    every = [science(config) for config in configs]
    shared = {
        key: value
        for key, value in every[0].items()
        if not f"{key}.".startswith(tuple(f"{swept_key}." for swept_key in keys))
        and all(other.get(key) == value for other in every)
    }
    run = configs[0].run
    root = (
        Path(os.path.expanduser(run.directory))
        if run.directory
        else Path("runs") / f"{run.name or configs[0].task.name}-sweep-{digest(shared)}"
    )
    root = first_free(root) if run.new else root
    if os.path.exists(root / "config.yaml"):
        problem = f"run.dir={root} holds a run, and a sweep needs a folder of its own"
        raise UserError(problem, "name another run.dir", "run.dir", str(root))
    identities = list(map(digest, every))
    known = _runs_in(root)
    return [
        _directory(root, overrides, known.get(identity) if identities.count(identity) == 1 else None)
        for overrides, identity in zip(swept, identities, strict=True)
    ]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _runs_in(root: Path) -> dict[str, Path]:
    """Return the directories of the runs in a sweep's folder by their identities."""
    found = {}
    for plan in sorted(root.glob("*/plan.json")):
        with suppress(FileNotFoundError, Unreadable, KeyError, TypeError):
            found[read_json(plan)["identity"]] = plan.parent
    return found


def _directory(root: Path, overrides: Sequence[str], same_run: Path | None) -> Path:
    """Return the directory of a sweep's run. Earlier versions kept the order in which overrides were written."""
    ordered = root / _folder(",".join(override.lstrip("+~") for override in sorted(overrides, key=_key)))
    typed = root / _folder(",".join(overrides))
    return next((place for place in (ordered, typed) if os.path.lexists(place)), same_run or ordered)


def _folder(text: str) -> str:
    """Return ``text`` as a folder's name that is safe in paths and shells, and not too long."""
    name = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:100].lstrip(".-") or "run"
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
