"""Isobatch's command: compose the config, resolve it to a plan, do one action, and end with its exit code."""
# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import sys

from trainers.stop import Stop, die_with_parent

STOP = Stop().install()  # before all else: a signal that comes while the rest is imported isn't lost
gc.disable()  # what is imported stays; workers turn it on again

import shlex
import signal
import subprocess
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import compose
from conf.explain import ConfigError
from conf.hardware import refuse_unless_startable, under_torchrun, world_size
from conf.help import annotated, command_line, help_text
from conf.identity import run_directory
from conf.stored import extends, lengthened
from conf.sweep import expand, sweep_directories
from scaling.record import to_json
from scaling.report import grid, plan_row, result
from scaling.resolve import continued, resolve
from scaling.table import table
from trainers.checkpoints.manifest import Damaged, checkpoints, read
from trainers.rundir import Refused, RunDir
from trainers.starting import workers

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from scaling.plan import Plan


def main(arguments: list[str]) -> int:
    """The exit code.

    Raises:
        ConfigError, Refused: what was asked for can't be.
    """
    args = command_line(arguments)
    if args.help:
        print(help_text(args.config_dir), end="")
        return 0
    if args.multirun:
        if args.cfg or under_torchrun():
            other = "--cfg prints one config" if args.cfg else "torchrun starts workers of one run"
            raise ConfigError(f"-m is a sweep of several runs, but {other}; leave out one of the two")
        return sweep(args.overrides, args.config_dir)
    config = compose(args.overrides, args.config_dir)
    if args.cfg:
        print(annotated(config))
        return 0
    if config.action == "evaluate":
        refuse_unless_startable(config)
        return start(config)
    plan, directory = planned(config), run_directory(config)
    if config.action == "plan":
        plan = from_checkpoint(plan, config, directory)
        say(to_json(plan) if config.output == "json" else table(plan))
        return 0
    return train(config, plan, directory)


def planned(config: RunConfig) -> Plan:
    """The plan for the hardware that the config names."""
    if config.action == "train":
        refuse_unless_startable(config)
        to_open = config.batch.global_size == "all" and config.task.train_samples is None  # as large as the data is
    else:
        to_open = config.plan.open_data
    try:
        return resolve(config, world_size(config), opened(config) if to_open else None)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def opened(config: RunConfig) -> int:
    """Training samples, counted by a process of its own: this one is to be forked, and stays without torch."""
    answer, reply = os.pipe()

    def count() -> int:
        from trainers.run import count_samples

        os.write(reply, str(count_samples(config)).encode())
        return 0

    if code := in_child(count):  # and has said why
        raise SystemExit(code)
    return int(os.read(answer, 20))


def train(config: RunConfig, plan: Plan, directory: Path) -> int:
    """Train in ``directory``; a run that is finished there shows its result."""
    longer = refuse_unless_free(directory, config)
    before = RunDir(directory).outcome()
    if before and before.state == "finished" and not longer:
        say(f"{result(directory)} · {directory} (run.new=true trains again, as after a change of your code)")
        return 0
    if config.task.train_samples is not None:  # else rank 0 prints it, once the data is opened
        say(table(from_checkpoint(plan, config, directory)))
    code = start(config, run_dir=str(directory), **({"extends": "1"} if longer else {}))
    after = RunDir(directory).outcome()
    if code in (0, 75) and after and after != before:
        with suppress(OSError):  # a full disk under the output doesn't change how the run ended
            say(f"{result(directory)} · {directory}{' (the same command goes on)' * (code == 75)}")
    return code


def start(config: RunConfig, **facts: str) -> int:
    """Start the workers, or be one; the exit code."""
    command = shlex.join(["python", *sys.argv])
    facts |= {"command": command, "commit": commit(), "attempt": uuid.uuid4().hex[:12]}
    return (workers.as_worker if under_torchrun() else workers.launch)(config, facts, STOP)


def from_checkpoint(plan: Plan, config: RunConfig, directory: Path) -> Plan:
    """``plan`` as it goes on from the newest checkpoint in ``directory`` that can be read; itself without one."""
    for path in checkpoints(RunDir(directory)):
        with suppress(Damaged):
            header = read(path).header
            longer = lengthened(config, header.identity, header.duration)
            if not longer and header.identity != plan.identity:
                break
            try:
                return continued(plan, header.plan, extends=longer)
            except ValueError as error:
                raise ConfigError(str(error)) from None
    return plan


def refuse_unless_free(directory: Path, config: RunConfig) -> bool:
    """Raises where ``directory`` can't be this run's; whether the run there is made longer."""
    RunDir(directory).refuse_foreign()
    return extends(directory, config)


def sweep(overrides: list[str], config_dir: str | None) -> int:
    """One run after another, each in a child of its own; all are planned before the first one starts."""
    elements, configs, plans = expand(overrides, config_dir), [], []
    for element in elements:
        try:
            configs.append(compose(element.overrides, config_dir))
            plans.append(planned(configs[-1]))
        except (ConfigError, Refused) as error:
            raise ConfigError(": ".join(filter(None, [" ".join(element.swept), str(error)]))) from None
    directories = sweep_directories(configs, [element.swept for element in elements])
    if configs[0].action == "plan":
        if configs[0].output == "json":
            say("[" + ",\n".join(map(to_json, plans)) + "]")
        else:
            say(grid([element.column | plan_row(plan) for element, plan in zip(elements, plans, strict=True)]))
        return 0
    runs = list(zip(configs, plans, directories, strict=True))
    for config, _, directory in runs:
        refuse_unless_free(directory, config)
    if not any(config.cluster.environment for config in configs):
        workers.import_torch(configs[0])  # once for all of them
    codes: list[int] = []
    for element, run in zip(elements, runs, strict=True):
        if STOP.wanted or 75 in codes:
            break
        say(f"\n[{len(codes) + 1} of {len(elements)}] {' '.join(element.swept)}")
        codes.append(in_child(lambda run=run: train(*run)))  # type: ignore[misc]
    say("\n" + grid([e.column | result(there).row() for e, there in zip(elements, directories, strict=True)]))
    say(str(directories[0].parent))
    if STOP.wanted or 75 in codes:
        say("stopped (the same command goes on)")
        return 75
    failed = set(codes) - {0}
    return 2 if failed == {2} else int(bool(failed))


def in_child(work: Callable[[], int]) -> int:
    """The exit code of ``work``, done in a forked process that is told of a wish to stop."""
    child = os.fork()
    if child == 0:
        die_with_parent(signal.SIGTERM)  # what a killed sweep had started stops
        workers.leave(guarded(work))
    told = False
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if STOP.wanted and not told:
            os.kill(child, signal.SIGTERM)
            told = True
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def commit() -> str:
    """The git commit of this checkout; empty outside one."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return ""


def say(text: str) -> None:
    """Print it once, however many ranks there are."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; what is refused is said in one message, by one process of each machine."""
    try:
        return work()
    except (ConfigError, Refused) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"isobatch: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:
        return int(end.code or 0)
    except BrokenPipeError:  # whoever read this has left
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may not know every sign
    if not under_torchrun():  # what another launcher left isn't ours
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    sys.path.insert(1, os.getcwd())  # a user's own module is found where the command is given
    workers.leave(guarded(lambda: main(sys.argv[1:])))
