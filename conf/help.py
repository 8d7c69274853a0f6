"""``--help`` and ``--cfg job``, made of the YAML files and their comments, so that nothing is said twice."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

from isobatch.conf.compose import roots_with
from isobatch.conf.messages import RECORDED, nearest, shown
from isobatch.conf.saved import choices
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError

HERE = Path(__file__).parent
WHOLE_RUNS = ("task", "experiment")  # groups whose choices give keys of the whole run, or none of their own
INDENT = 36  # of what a key means, in --help

WHAT = """\
Isobatch trains on any hardware with the global batch you ask for: describe a run by its batch,
and it is the same run on one GPU, on many, and on a laptop. What was stopped, or crashed, goes on
from its last checkpoint when the same command is given again, on whatever hardware is there.
"""

EXAMPLES = """\
examples:
  python launch.py                                          train handwritten digits on this machine
  python launch.py batch.global_size=128                    with a larger batch; the learning rate follows
  python launch.py action=plan cluster.nodes=16 cluster.gpus_per_node=8 batch.global_size=65536
                                                            what it would be on 128 GPUs, which needn't be here
  python launch.py action=plan task=images batch.global_size=2048 optimizer=auto
                                                            which optimizer suits family and batch, and why
  python launch.py batch.schedule="0sa:64 50%:256"          a batch that moves while training
  python launch.py task=custom task._target_=my_package.MyTask task.args.width=7
  python launch.py optimizer=custom optimizer._target_=torch.optim.RMSprop optimizer.args.alpha=0.9 lr.peak=0.001
  python launch.py engine=deepspeed engine.stage=2          the same run, gradients and optimizer state in parts
  python launch.py batch.per_gpu=16 numerics=bitwise        the same weights, bit by bit, on any number of processes
  python launch.py -m batch.global_size=32,64,128 duration=5ep
                                                            a sweep: one run after another, then a table
  python launch.py run.dir=runs/digits-0123456789ab         goes on with that run; shows its result if finished
  python launch.py run.dir=runs/digits-0123456789ab duration=40ep
                                                            extends it, finished or not, to a longer duration
  python launch.py init_from=runs/digits-0123456789ab lr.peak=0.01
                                                            another run, which starts from that one's weights
  python launch.py action=evaluate init_from=runs/digits-0123456789ab
                                                            evaluates them (a checkpoint: …/checkpoints/best)
  torchrun --nproc-per-node=2 launch.py                     the same, with torchrun's workers
  python launch.py cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.time_min=240
                                                            plans, submits a job of Slurm's, and ends
  python launch.py action=runs                              the runs here and in the queue, and how far they are
"""

ENDS = (
    "exit codes: 0 finished · 2 refused, with the reason · 75 stopped by a signal and saved · "
    "1 crashed, or out of memory · 130 by a second Ctrl-C"
)


class Entry(NamedTuple):
    """A line of a YAML file: ``value`` as it is written there, and what its comment says."""

    value: str
    meaning: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        options = [option for action in self._actions for option in action.option_strings]
        raise UserError(
            message + (nearest(unknown[1], options) if unknown else "") + " (--help shows the command line)"
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("launch.py", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true", help="this text")
    parser.add_argument("--cfg", "-c", choices=["job"], help="job: print the composed config, each key explained")
    parser.add_argument(
        "--config-dir",
        "-cd",
        metavar="DIR",
        help="a folder of your own YAML: DIR/task/mine.yaml is task=mine and begins with 'defaults: [custom, _self_]', "
        "DIR/experiment/mine.yaml is experiment=mine and begins with '# @package _global_'",
    )
    parser.add_argument("--multirun", "-m", action="store_true", help="a sweep over the values that commas part")
    return parser


def command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """``overrides``, ``help``, ``cfg``, ``config_dir``, ``multirun``. Raises UserError."""
    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.config_dir is not None and not os.path.isdir(parsed.config_dir):
        raise UserError(f"--config-dir={shown(parsed.config_dir)} isn't a folder")
    for ours in HERE.glob("**/*.yaml") if parsed.config_dir is not None else ():
        theirs = Path(parsed.config_dir) / ours.relative_to(HERE)
        if theirs.exists() and not theirs.samefile(ours):
            raise UserError(f"{theirs} is named as a file of Isobatch's own, which goes first; give it another name")
    return parsed


def help_text(overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The command line, and every key: those of the choices that ``overrides`` name, with what they mean there."""
    roots = roots_with(config_dir)
    width = max(80, min(140, shutil.get_terminal_size((120, 0)).columns))
    lines = ["usage: python launch.py [key=value …] [options]", "", WHAT, EXAMPLES]
    lines.append("choices (a group's own keys come with its choice; --config-dir adds more):")
    for group, default in _defaults().items():
        files = sorted(file for root in roots for file in (root / group).glob("*.yaml"))
        for file in sorted(files, key=lambda file: file.stem != default):
            usual = " (the default)" if file.stem == default else ""
            lines += _row(f"{group}={file.stem}", _title(file) + usual, width)
    lines += ["", "keys, with their defaults:"]
    chosen = _files(_defaults() | _named(overrides, roots) | {"experiment": ""}, roots)
    said = meanings(chosen)
    found = entries(HERE / "config.yaml")
    for file in chosen:
        found |= {key: entry for key, entry in entries(file, file.parent.name).items() if key not in found}
    for key, entry in found.items():
        lines += _row(f"{key}={entry.value}", entry.meaning or said.get(key, ""), width)
    for group in _defaults():
        for file in sorted((HERE / group).glob("*.yaml")):
            own = {} if group in WHOLE_RUNS or file in chosen else entries(file, group)
            if own := {key: entry for key, entry in own.items() if key not in found}:
                lines += ["", f"keys that come with {group}={file.stem}:"]
                for key, entry in own.items():
                    lines += _row(f"{key}={entry.value}", entry.meaning or said.get(key, ""), width)
    lines += ["", "durations: 10ep (epochs), 5000st (steps), 1e6sa (samples), 2e9tok (tokens), 5% (of the run)", ""]
    lines.append("options:")
    for action in _parser()._actions:
        if action.option_strings:
            lines += _row(", ".join(action.option_strings), action.help or "", width)
    lines += ["  key=value, +key=value, ~key, group=choice and quoting are Hydra's grammar of overrides", ""]
    lines += textwrap.wrap(ENDS, width)
    return "\n".join(lines) + "\n"


def _row(left: str, right: str, width: int) -> list[str]:
    """``left`` and what it means beside it, wrapped; below it where it is long."""
    head = f"  {left:<{INDENT - 4}}  "
    lines = textwrap.wrap(right, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    if len(head) > INDENT or not lines:
        return [head.rstrip(), *lines]
    return [head + lines[0][INDENT:], *lines[1:]]


def _title(file: Path) -> str:
    """A file's first comment that isn't for Hydra."""
    comments = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return comments[0] if comments else ""


def _defaults() -> dict[str, str]:
    """Group → its default choice."""
    return dict(re.findall(r"^  - (\w+): (\w+)$", (HERE / "config.yaml").read_text(), re.MULTILINE))


def entries(file: Path, prefix: str = "") -> dict[str, Entry]:
    """Dotted key → its line, for the keys that have a comment or hold a value."""
    found: dict[str, Entry] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"(?!defaults:)( *)(\w+):(?: ([^ #].*?))?(?:  # (.*))?", line):
            indent, name, value, meaning = len(match[1]), match[2], match[3], match[4]
            path = [(depth, above) for depth, above in path if depth < indent] + [(indent, name)]
            if value is not None or meaning:
                key = ".".join([prefix] * bool(prefix) + [above for _, above in path])
                found[key] = Entry(value or "", meaning or "")
    return found


def meanings(chosen: Sequence[Path] = ()) -> dict[str, str]:
    """Dotted key → its comment: in config.yaml, in the first of the ``chosen`` files of its group that has one, else
    in whichever other file of the group. Of tasks, whose arguments are their own, custom alone speaks for others.
    """
    others = [file for file in sorted(HERE.glob("*/*.yaml")) if file.parent.name != "task" or file.stem == "custom"]
    found = {}
    for file in [HERE / "config.yaml", *others, *reversed(chosen)]:
        prefix = "" if file.parent == HERE else file.parent.name
        found.update({key: entry.meaning for key, entry in entries(file, prefix).items() if entry.meaning})
    return found


def _named(overrides: Sequence[str], roots: Sequence[Path]) -> dict[str, str]:
    """Group → the choice that overrides name, or their experiments; what is no choice is passed over."""
    pairs = [text.partition("=") for text in overrides]
    named = {key: choice for key, _, choice in pairs if key in _defaults() and _files({key: choice}, roots)}
    texts = [file.read_text() for file in _files({"experiment": named.get("experiment", "")}, roots)]
    return dict(re.findall(r"^  - override /(\w+): (\w+)$", "\n".join(texts), re.MULTILINE)) | named


def _files(chosen: Mapping[str, str], roots: Sequence[Path]) -> list[Path]:
    """The files of these choices, as far as there are any; after each those of its group that it begins with."""
    found = []
    for group, choice in chosen.items():
        names = [choice]
        for name in names:
            for file in [root / group / f"{name}.yaml" for root in roots if (root / group / f"{name}.yaml").is_file()]:
                found.append(file)
                above = re.search(r"^defaults: *\[(.*)\]", file.read_text(), re.MULTILINE)
                names += [name for name in re.findall(r"\w+", above[1] if above else "") if name not in names]
    return found


def annotated(config: RunConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The config as YAML, each key with its comment in the files that ``overrides`` or the config's names choose."""
    plain, roots = config.model_dump(mode="json", by_alias=True, exclude=set(RECORDED)), roots_with(config_dir)
    named = {group: choice for group, choice in _named(overrides, roots).items() if choice != "auto"}
    said, lines = meanings(_files(choices(plain, but=()) | named, roots)), []
    path: list[str] = []
    for line in yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000).splitlines():
        if match := re.match(r"( *)(\w+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            meaning = said.get(".".join(path))
            line += f"  # {meaning}" if meaning else ""
        lines.append(line)
    return "\n".join(lines)
