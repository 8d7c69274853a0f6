"""``--help`` and ``--cfg job``, derived from the YAML files and their comments."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml

from isobatch.conf.comments import Line, read_lines
from isobatch.conf.elsewhere import our_key, our_value
from isobatch.conf.keys import HERE, RECORDED, choices_of, keys, registered, sections
from isobatch.conf.layers import roots_with
from isobatch.conf.messages import nearest, shown
from isobatch.conf.overrides import refuse_spaces
from isobatch.conf.saved import choices
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import Unreadable, read_yaml

WHOLE_RUNS = ("task", "experiment")  # groups whose choices give keys of the whole run, or none of their own
INDENT = 36  # of what a key means, in --help

WHAT = """\
Describe a training run by its global batch, launch it on any hardware, get the same run: on one GPU,
on many, and on a laptop. If a run was stopped or crashed, the same command resumes it from its last
checkpoint, on whatever hardware is there.
"""

EXAMPLES = """\
examples:
  python launch.py                                          train on handwritten digits on this machine
  python launch.py batch.global_size=128                    a larger batch; the learning rate follows
  python launch.py action=plan cluster.nodes=16 cluster.gpus_per_node=8 batch.global_size=65536
                                                            the plan for 128 GPUs that aren't here
  python launch.py action=plan task=images batch.global_size=2048 optimizer=auto
                                                            the optimizer that suits task and batch, and why
  python launch.py batch.schedule="0sa:64 50%:256"          a batch that changes during the run
  python launch.py task=custom task._target_=my_package.MyTask task.args.width=7
  python launch.py optimizer=custom optimizer._target_=torch.optim.RMSprop optimizer.args.alpha=0.9 lr.peak=0.001
  python launch.py engine=deepspeed engine.stage=2          the same run with gradients and optimizer state sharded
  python launch.py batch.per_gpu=16 numerics=bitwise        the same weights, bit by bit, on any number of processes
  python launch.py -m batch.global_size=32,64,128 duration=5ep
                                                            a sweep: one run after another, then a table
  python launch.py run.dir=runs/digits-0123456789ab         resume that run; show its result if it is finished
  python launch.py run.dir=runs/digits-0123456789ab duration=40ep
                                                            extend it to a longer duration
  python launch.py init_from=runs/digits-0123456789ab lr.peak=0.01
                                                            a new run that starts from its weights
  python launch.py action=evaluate init_from=runs/digits-0123456789ab
                                                            evaluate them (or a checkpoint: …/checkpoints/best)
  python launch.py action=tune duration=5ep                 measure which batch to use, and recommend one
  torchrun --nproc-per-node=2 launch.py                     the same run with torchrun's workers
  python launch.py cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.time_min=240
                                                            print the plan, submit a Slurm job, and exit
  python launch.py action=runs                              list the runs here and in the queue
  python launch.py action=report run.dir=[runs/a,runs/b]    compare runs: tables, plots and a page
"""

ENDS = (
    "exit codes: 0 finished · 2 rejected, with the reason · 75 stopped by a signal and saved · "
    "1 crashed, or out of memory · 130 by a second Ctrl-C"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, "--help shows the command line")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("launch.py", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true", help="show this text")
    parser.add_argument("--cfg", "-c", choices=["job"], help="job: print the composed config and what each key means")
    parser.add_argument(
        "--config-dir",
        "-cd",
        metavar="DIR",
        help="a folder of your own YAML: DIR/task/mine.yaml is task=mine and begins with 'defaults: [custom, _self_]', "
        "DIR/experiment/mine.yaml is experiment=mine and begins with '# @package _global_'",
    )
    parser.add_argument("--multirun", "-m", action="store_true", help="sweep over the values separated by commas")
    return parser


def command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """Return ``overrides``, ``help``, ``cfg``, ``config_dir`` and ``multirun``. Raises UserError."""
    parser = _parser()
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise _no_such_option(unknown[0], arguments)
    refuse_spaces(parsed.overrides)
    if parsed.config_dir is not None and not os.path.isdir(parsed.config_dir):
        raise UserError(f"--config-dir={shown(parsed.config_dir)} isn't a folder")
    for ours in HERE.glob("**/*.yaml") if parsed.config_dir is not None else ():
        theirs = Path(parsed.config_dir) / ours.relative_to(HERE)
        if theirs.exists() and not theirs.samefile(ours):
            raise UserError(f"{theirs} is named as a file of Isobatch's own, which goes first", "give it another name")
    return parsed


def _no_such_option(unknown: str, arguments: Sequence[str]) -> UserError:
    """Return the error for an option that isn't there; the word after it in ``arguments`` may be its value."""
    options = [option for action in _parser()._actions for option in action.option_strings]
    option, equals, value = unknown.partition("=")
    key = option.lstrip("-").replace("-", "_")
    after = dict(pairwise(arguments)).get(unknown, "")
    value = value if equals else after * (not after.startswith("-") and "=" not in after)
    ours = key in keys() and (key not in sections() or bool(choices_of(key)))
    meant = (our_value(key, value) or f"{key}={value or '…'}") if ours else our_key(key, value)
    if meant or "." in key:
        return UserError(f"there is no option {option}", f"keys have no dashes: {meant or f'{key}={value}'}")
    fix = nearest(option, options) or "--help shows the command line"
    return UserError(f"there is no option {option}", fix)


def help_text(overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """Return the text of ``--help``: usage, choices and every key.

    Args:
        overrides: the choices they name come first, with the meaning that keys have there.
        config_dir: a folder of the user's YAML.
    """
    roots = roots_with(config_dir)
    width = max(80, min(140, shutil.get_terminal_size((120, 0)).columns))
    lines = ["usage: python launch.py [key=value …] [options]", "", WHAT, EXAMPLES]
    lines.append("choices (a group's own keys come with its choice; --config-dir adds more):")
    for group, default in _defaults().items():
        files = sorted(file for root in roots for file in (root / group).glob("*.yaml"))
        for file in sorted(files, key=lambda file: file.stem != default):
            usual = " (the default)" if file.stem == default else ""
            lines += _row(f"{group}={file.stem}", _title(file) + usual, width)
    chosen = _files(_defaults() | _named(overrides, roots) | {"experiment": ""}, roots)
    said, found = meanings(chosen), set[str]()

    def rows(file: Path, group: str = "") -> list[str]:
        """Return what to print of the keys of a file that no earlier one has."""
        own = {line.key: line for line in _entries(file, group) if line.key not in found}
        found.update(own)
        means = {key: _meaning(key, line.comment) or said.get(key, "") for key, line in own.items()}
        return [text for key, line in own.items() for text in _row(f"{key}={line.value}", means[key], width)]

    lines += ["", "keys, with their defaults:", *rows(HERE / "config.yaml")]
    lines += [text for file in chosen for text in rows(file, file.parent.name)]
    of_chosen = set(found)
    for group in _defaults():
        for file in sorted((HERE / group).glob("*.yaml")) if group not in WHOLE_RUNS else ():
            found = set(of_chosen)
            if file not in chosen and (own := rows(file, group)):
                lines += ["", f"keys that come with {group}={file.stem}:", *own]
    lines += ["", "durations: 10ep (epochs), 5000st (steps), 1e6sa (samples), 2e9tok (tokens), 5% (of the run)", ""]
    lines.append("options:")
    for action in _parser()._actions:
        if action.option_strings:
            lines += _row(", ".join(action.option_strings), action.help or "", width)
    lines += ["  key=value, +key=value, ~key, group=choice and quoting are Hydra's grammar of overrides", ""]
    lines += textwrap.wrap(ENDS, width)
    return "\n".join(lines) + "\n"


def _row(left: str, right: str, width: int) -> list[str]:
    """Return ``left`` with its meaning beside it, wrapped, or below it if ``left`` is long."""
    head = f"  {left:<{INDENT - 4}}  "
    lines = textwrap.wrap(right, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    if len(head) > INDENT or not lines:
        return [head.rstrip(), *lines]
    return [head + lines[0][INDENT:], *lines[1:]]


def _title(file: Path) -> str:
    """Return the file's first comment that isn't a directive for Hydra."""
    comments = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return comments[0] if comments else ""


def _entries(file: Path, prefix: str) -> list[Line]:
    """Return the keys of a file that have a comment or hold a value."""
    lines = read_lines(file.read_text(), prefix)
    return [line for line in lines if (line.value or line.comment) and line.key != ".".join([prefix, "defaults"])]


def meanings(chosen: Sequence[Path] = ()) -> dict[str, str]:
    """Return the meaning of each dotted key: its comment in the YAML.

    The first of the ``chosen`` files of a group that has a comment wins, then the group's other files. Of the tasks
    only custom counts for others, since arguments belong to one task.
    """
    others = [file for file in sorted(HERE.glob("*/*.yaml")) if file.parent.name != "task" or file.stem == "custom"]
    found = {}
    for file in [HERE / "config.yaml", *others, *reversed(chosen)]:
        lines = _entries(file, "" if file.parent == HERE else file.parent.name)
        found.update({line.key: _meaning(line.key, line.comment) for line in lines if line.comment})
    return found


def _meaning(key: str, comment: str) -> str:
    """Return the comment, after the names that the key's registry knows."""
    return ": ".join(filter(None, [" | ".join(registered(key)), comment]))


def _listed(file: Path) -> list[Any]:
    """Return the defaults list of a file: names, and a one-key mapping for each group's choice."""
    try:
        content = read_yaml(file)
    except Unreadable:
        return []
    return (content.get("defaults") or []) if isinstance(content, dict) else []


def _defaults() -> dict[str, str]:
    """Return group → its default choice."""
    pairs = [pair for pair in _listed(HERE / "config.yaml") if isinstance(pair, dict)]
    return {group: choice or "" for pair in pairs for group, choice in pair.items()}


def _named(overrides: Sequence[str], roots: Sequence[Path]) -> dict[str, str]:
    """Return group → the choice that the overrides or their experiment name."""
    pairs = [text.partition("=") for text in overrides]
    named = {key: choice for key, _, choice in pairs if key in _defaults() and _files({key: choice}, roots)}
    files = _files({"experiment": named.get("experiment", "")}, roots)
    listed = [pair for file in files for pair in _listed(file) if isinstance(pair, dict)]
    chosen = {key.removeprefix("override /"): choice for pair in listed for key, choice in pair.items()}
    return {group: choice for group, choice in chosen.items() if group in _defaults()} | named


def _files(chosen: Mapping[str, str], roots: Sequence[Path]) -> list[Path]:
    """Return the files of these choices that exist, each followed by the files of its group that it inherits from."""
    found = []
    for group, choice in chosen.items():
        names = [choice]
        for name in names:
            for file in [root / group / f"{name}.yaml" for root in roots if (root / group / f"{name}.yaml").is_file()]:
                found.append(file)
                names += [one for one in _listed(file) if isinstance(one, str) and one not in (*names, "_self_")]
    return found


def annotated(config: RunConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """Return the config as YAML, each key with its comment from the chosen files."""
    plain, roots = config.model_dump(mode="json", by_alias=True, exclude=set(RECORDED)), roots_with(config_dir)
    named = {group: choice for group, choice in _named(overrides, roots).items() if choice != "auto"}
    said = meanings(_files(choices(plain, but=()) | named, roots))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000)
    rows = text.splitlines()
    for line in read_lines(text):
        if meaning := said.get(line.key):
            rows[line.row] += f"  # {meaning}"
    return "\n".join(rows)
