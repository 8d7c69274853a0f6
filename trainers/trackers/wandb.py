"""W&B, offline: a folder in ``wandb/`` of the run directory. ``wandb sync RUN/wandb/offline-run-*`` uploads it."""

from __future__ import annotations

import shutil
from typing import Any

import wandb

from isobatch.conf.rundir.outcome import known_outcome
from isobatch.conf.trackers import WandB
from isobatch.trainers.trackers.tracker import Line, RunInfo, numbers


class Adapter:
    """Write one offline run, which each start rewrites: W&B never takes a step back."""

    rewrites = True

    def __init__(self, args: WandB) -> None:
        self._args = args

    def open(self, run: RunInfo) -> None:
        self._info, args = run, self._args
        for folder in (run.directory / "wandb").glob(f"offline-run-*-{run.id}"):
            shutil.rmtree(folder)
        self._run: Any = wandb.init(
            mode="offline",
            dir=str(run.directory),
            id=run.id,
            project=args.project or run.config["task"]["name"],
            entity=args.entity,
            group=args.group or run.group,
            name=args.name or run.name,
            notes=args.notes,
            tags=list(args.tags) or None,
            config={"config": run.config, "plan": run.plan},
            settings=wandb.Settings(
                console="off", silent=True, symlink=False, x_disable_stats=True, disable_git=True, disable_code=True
            ),
        )

    def write(self, line: Line) -> None:
        at = self._info.time_of(line)
        self._run.log(numbers(line) | {"_timestamp": at}, step=line["step"])

    def close(self) -> None:
        outcome = known_outcome(self._info.directory)
        self._run.finish(exit_code=outcome.exit_code if outcome else 1)
        wandb.teardown()
