"""A ``run.dir`` that holds no run: a new run where the command says what to train, else probably a typo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from isobatch.conf.compose import config_in_run_dir, parse
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError

SAYS_WHAT_TO_TRAIN = {"task", "task._target_", "experiment"}
MOST_NAMES = 2000  # that are compared in one folder
SHOWN = 3


def refuse_typo(overrides: Sequence[str], config: RunConfig) -> None:
    """Raise UserError where ``run.dir`` holds no run to resume and the command doesn't say what to train there."""
    if not config.run.dir or config.run.config or config.action not in ("train", "plan"):
        return
    values = {override.key_or_group: override.value() for override in map(parse, overrides)}
    if config_in_run_dir(values) or values.keys() & SAYS_WHAT_TO_TRAIN:
        return
    near = _nearest_runs(Path(os.path.expanduser(config.run.dir)))
    hint = f"; did you mean {' or '.join(map(str, near))}?" if near else ";"
    raise UserError(
        f"run.dir={config.run.dir} holds no run to resume{hint} a new run there needs its task, too: task=…, "
        "task._target_=… or experiment=…"
    )


def _nearest_runs(directory: Path) -> list[Path]:
    """Return runs beside ``directory`` and in ``runs/`` whose names are like its own."""
    found: dict[str, Path] = {}
    for folder in (directory.parent, Path("runs")):
        with suppress(OSError), os.scandir(folder) as entries:
            found |= {entry.name: folder / entry.name for entry in islice(entries, MOST_NAMES)}
    near = [found[name] for name in get_close_matches(directory.name, found, n=3 * SHOWN)]
    return [run for run in near if (run / "config.yaml").is_file()][:SHOWN]
