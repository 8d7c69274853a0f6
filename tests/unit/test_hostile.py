"""Test that any file or command line gives exit code 0, or 2 with one message, and never a traceback or a hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch
from isobatch.conf.compose import compose
from isobatch.conf.keys import keys
from isobatch.conf.saved import dump
from isobatch.conf.sweep import MOST_RUNS, expand
from isobatch.conf.terminal import say
from isobatch.scaling.errors import UserError
from isobatch.scaling.report.grid import grid
from isobatch.scaling.report.plan_json import from_json
from isobatch.trainers.launch.children import guarded
from tests.support.examples import examples

TASK = (
    "defaults: [custom, _self_]\nname: mine\n_target_: m.T\n"
    "tuned: {sgd: {lr: 0.1, batch: 32}}\ntrain_samples: 100\nargs: "
)
LAUGHS = "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 10)}]\n" for n in range(8))
YAML: dict[str, bytes | Callable[[Path], object]] = {
    "8 levels of aliases": b"args:\n" + LAUGHS.encode(),
    "an alias of itself": b"args: &a [*a]",
    "an alias of nothing": b"args: *a",
    "a number of 10,000 digits": b"args: " + b"1" * 10_000,
    "a hexadecimal number of 10,000 digits": b"args: 0x" + b"f" * 10_000,
    "a list 3,000 deep": b"args: " + b"[" * 3000 + b"]" * 3000,
    "a mapping 3,000 deep": b"args: " + b"{a: " * 3000 + b"}" * 3000,
    "binary": bytes(range(256)),
    "latin-1": b"args: {a: \xe9}",
    "an object of Python's": b"args: !!python/object/apply:os.getcwd []",
    "a key that is a list": b"? [1]\n: 2",
    "a date that there isn't": b"args: {a: 2020-99-99}",
    "a list": b"[1, 2]",
    "text": b"text",
    "nothing": b"",
    "unfinished": b"args: {a: [",
    "a pipe": lambda file: os.mkfifo(file),
    "a folder": lambda file: file.mkdir(),
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "1 GB": lambda file: (file.touch(), os.truncate(file, 1 << 30)),
    "recursive interpolation": b"args: {a: '${args.b}', b: '${args.a}'}",
}


def put(file: Path, content: bytes | Callable[[Path], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content(file)


def run_safely(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command, check that it exits with 0, or with 2 and a message, and return its stderr."""
    code = guarded(lambda: launch.main(list(arguments), []))
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert code == 0 or "isobatch: " in err
    assert len(err) < 4000
    assert "\x1b" not in out + err
    return str(err)


# ---- files


@pytest.fixture(scope="module")
def stored() -> str:
    return dump(compose([]))


@pytest.mark.parametrize("what", YAML)
def test_a_damaged_config_of_a_run_is_named(
    tmp_path: Path, what: str, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, file = YAML[what], tmp_path / "config.yaml"
    if isinstance(content, bytes) and content.startswith(b"args: "):  # the only damage of a valid config
        content = stored.encode().replace(b"  args: {}", b"  args: " + content[6:], 1)
    put(file, content)
    assert str(file) in run_safely(capsys, f"run.dir={tmp_path}", "action=plan")


@pytest.mark.parametrize("what", YAML)
@pytest.mark.parametrize("group", ["task", "experiment"])
def test_a_damaged_users_yaml_is_reported(
    tmp_path: Path, what: str, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = YAML[what]
    if isinstance(content, bytes) and content.startswith(b"args: ") and group == "task":
        content = TASK.encode() + content[6:]
    put(tmp_path / group / "mine.yaml", content)
    output = run_safely(capsys, "action=plan", f"--config-dir={tmp_path}", f"{group}=mine")
    assert output or what in ("nothing", "a date that there isn't")  # Hydra reads these as text


def test_small_aliases_are_accepted(tmp_path: Path) -> None:
    put(tmp_path / "task" / "mine.yaml", TASK.encode() + b"{a: &a [1, 2], b: *a}")
    assert compose(["task=mine"], tmp_path).task.args == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("name", ["outcome.json", "plan.json", "config.yaml"])
def test_a_damaged_file_of_a_run_directory_is_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, content in enumerate((b"[" * 100_000, b"\xff\xfe", b"[]", b'{"identity": [[1]]}', os.mkfifo, os.mkdir)):
        put(tmp_path / str(number) / name, content)
        task = [] if name == "config.yaml" else ["task=digits"]  # a folder without a config needs a task
        assert name in run_safely(capsys, *task, f"run.dir={tmp_path / str(number)}")


# ---- the command line

NAMES = ["a" * 300, "a" * 5000, "a/" * 3000, "\0", "a\nb", "\x1b[2J", "\udc80", "~nobody/x", "", "/dev/null/x"]
PATH_KEYS = ["run.dir", "run.name", "run.config", "init_from", "task", "--config-dir"]


@pytest.mark.parametrize("key", PATH_KEYS)
def test_odd_names_and_paths_are_handled(key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    for text in (*NAMES, str(file)):
        quote = "" if key.startswith("-") else "'"
        run_safely(capsys, "action=plan", f"{key}={quote}{text}{quote}")


def test_runs_are_listed_in_any_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for text in NAMES:
        run_safely(capsys, "action=runs", f"run.dir='{text}'")
        run_safely(capsys, "action=report", f"run.dir=['{text}']")


@pytest.mark.parametrize("depth", [20, 60, 150, 5000])
def test_deeply_nested_overrides_are_handled(depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("seed", "task.args.x", "+model.args.x", "batch.schedule"):
        run_safely(capsys, "action=plan", f"{key}={'[' * depth}{']' * depth}")
        run_safely(capsys, "action=plan", f"{key}={'{a:' * depth}1{'}' * depth}")


@pytest.mark.parametrize(
    "text",
    ["seed=${seed}", "seed=${oc.env:NO_SUCH_VARIABLE}", "seed=${oc.env:HOME}", "task.args.x=${task.args.x}",
     "run.dir=${run.dir}", "seed='${" + "${" * 200 + "}'", "seed=${nothing}", "seed=${.seed}", "seed=${oc.decode:'[['}",
     "task.args.x=${task}", "seed=[" + "1," * 20_000 + "1]", "seed=" + "9" * 5000, "=", "==", "a", "~", "~seed", "@=1"],
    ids=lambda text: text[:25],
)  # fmt: skip
def test_odd_overrides_are_handled(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_safely(capsys, "action=plan", text)


@pytest.mark.parametrize(
    "sweep",
    [["seed=range(0,1000000000000)"], ["seed=shuffle(range(0,1000000000))"], ["seed=range(0,5,0)"],
     ["seed=range(0,1e9,1e-9)"], [f"{key}=range(0,200)" for key in ("seed", "lr.peak", "batch.global_size")],
     ["seed=interval(0,1)"], ["seed=glob(*)"], ["seed=range(5,0)"], ["seed=choice()"]],
    ids=lambda sweep: sweep[0],
)  # fmt: skip
def test_enormous_sweeps_are_refused(sweep: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_safely(capsys, "-m", "action=plan", *sweep)


def test_sweeps_up_to_the_limit_are_expanded() -> None:
    assert len(expand([f"seed=range(0,{MOST_RUNS})"])) == MOST_RUNS
    with pytest.raises(UserError, match=f"{MOST_RUNS:,}"):
        expand([f"seed=range(0,{MOST_RUNS + 1})"])


NUMBERS = st.sampled_from(
    ["0", "-1", "1", "7", "64", "1e3", "1e15", "1000000000000000", "1000000000000001", "9223372036854775808",
     "1" * 400, "1e999", "-1e999", "1e-320", "-0.0", "nan", "inf", ".5", "0.1", "1.5"]
)  # fmt: skip
DURATIONS = st.builds(
    lambda number, unit: number + unit, NUMBERS, st.sampled_from(["ep", "st", "sa", "tok", "%", "min", "x"])
)
WORDS = st.sampled_from(
    ["null", "true", "''", "[]", "{}", "auto", "all", "sync", "ghost", "bitwise", "sgd", "adamw", "lamb", "none", "sde",
     "legw", "half-life", "noise", "surge", "power", "step", "wsd", "cosine", "tokens", "'0sa:64 50%:1'", "seesaw",
     "doubling", "'ramp from:1 over:1e15sa by:1'", "'curriculum from:1 to:1000000000000000'", "[10%,20%]", "slurm",
     "deepspeed", "fsdp", "json", "[1e999]", "{a: {b: [1]}}", "val/x:max", "a.b", "\u202e", "'a\x1b[2J'"]
)  # fmt: skip
KEYS = sorted(key for key in set(keys()) if key not in ("given", "chosen", "action", "plan.open_data", "run.config"))


def overrides() -> Iterator[st.SearchStrategy[str]]:
    """Yield strategies for an override of any key, with a valid or invalid value."""
    for values in (NUMBERS, DURATIONS, WORDS):
        yield st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), values)


@given(st.lists(st.one_of(*overrides()), min_size=1, max_size=4))
@examples(40)
def test_any_values_give_a_readable_plan_or_one_message(
    capsys: pytest.CaptureFixture[str], given_overrides: list[str]
) -> None:
    plain = [text for text in given_overrides if not text.startswith(("output=", "cluster=slurm", "debug="))]
    code = guarded(lambda: launch.main(["action=plan", "cluster.gpus_per_node=1", *plain, "output=json"], []))
    out, err = capsys.readouterr()
    assert code in (0, 2), (plain, err)
    if code == 0:
        from_json(out)


# ---- printed texts


def test_escape_codes_are_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    evil: dict[str, Any] = {"val/\x1b[2Jx\n": 1.0, "state": "a\x9b31m\rb"}
    say(grid([evil]))
    say("name\x1b]0;title\x07 \u202e")
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x9b", "\x07", "\r", "\u202e"}
    assert r"val/\u001b[2Jx\n" in out
    assert len(out.splitlines()) == 3
