"""Checking a config; what is wrong is said in a line each: the key with its value, and what would work."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import MOST_DEPTH as READ_DEPTH

HERE = Path(__file__).parent
RECORDED = ("given", "chosen")  # of a config, but no keys
DEEPEST = READ_DEPTH // 2  # lists and mappings in a value: what is written here is read back
BITS = 64  # of a whole number; tools that read the config hold no longer one
SHOWN = 400  # characters of a value in a message

# What other launchers call it, where the spelling is too far from ours to be guessed.
ELSEWHERE = {
    name: ours
    for ours, names in {
        "duration=10ep": "epochs max_epochs num_train_epochs",
        "duration=5000st": "max_steps",
        "lr.base or lr.peak": "learning_rate lr",
        "batch.global_size or batch.per_gpu": "batch_size",
        "batch.global_size": "train_batch_size",
        "batch.per_gpu": "per_device_train_batch_size",
        "batch.accumulation": "gradient_accumulation_steps",
        "clip_norm": "gradient_clip_val max_grad_norm",
        "data.workers": "num_workers",
        "cluster.gpus_per_node": "devices nproc_per_node",
        "cluster.nodes": "nnodes",
        "run.dir=DIR (and the same command goes on by itself)": "resume resume_from resume_from_checkpoint auto_resume",
        "run.dir=DIR, to go on, or init_from=PATH, to start from its weights": "ckpt_path load_checkpoint",
        "init_from=PATH": "weights pretrained finetune_from",
        "run.dir": "output_dir save_dir",
        "checkpoint.every=500st or checkpoint.every=10min": "save_every save_steps save_interval every_n_train_steps",
        "checkpoint.keep": "save_total_limit save_top_k",
        "checkpoint.best=val/accuracy:max": "monitor metric_for_best_model load_best_model_at_end",
        "action=evaluate init_from=DIR": "eval_only test_only",
        "evaluate.every=500st": "eval_steps eval_every",
        "evaluate.first=true": "eval_on_start",
        "evaluate.per_gpu": "per_device_eval_batch_size eval_batch_size",
        "evaluate.samples=1000": "max_eval_samples eval_samples eval_iters limit_val_batches",
        "ema=2000sa (its half-life)": "ema_decay use_ema",
        "on_nonfinite=skip": "skip_nan",
        "engine=ddp, fsdp, accelerate or deepspeed": "strategy backend",
        "engine.stage, with engine=deepspeed": "zero_stage",
        "engine.shard, with engine=fsdp": "auto_wrap_policy transformer_layer_cls_to_wrap",
        "engine.offload, with engine=fsdp or deepspeed": "cpu_offload offload_optimizer",
        "precision": "mixed_precision",
        "numerics=bitwise": "deterministic use_deterministic_algorithms",
    }.items()
    for name in names.split()
}

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that isn't empty",
    "tuple_type": "a list: [a,b]",
    "dict_type": "a mapping: {{name: value}}",
    "finite_number": "finite",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_long": "a list of {max_length}",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}


def validated(plain: dict[str, Any]) -> RunConfig:
    """``plain`` as a RunConfig.

    Raises:
        UserError: it isn't one.
    """
    _check_values("", plain)
    try:
        return RunConfig.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise UserError(explain(error, plain)) from None


def _check_values(key: str, value: Any, depth: int = 0) -> None:
    """Nothing but what JSON can say without a loss: free mappings may hold anything, and all of it is hashed."""
    if depth > DEEPEST:
        raise UserError(f"{key:.100}… can't be: it is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r}; keys have to be text, as '{name}' in quotes")
            _check_values(f"{key}.{name}" if key else name, inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(f"{key}.{index}", inner, depth + 1)
    elif value == "???":
        raise UserError(f"{key} has to be given: {key}=…")
    elif isinstance(value, str) and not value.isascii() and value.encode("utf-8", "ignore").decode() != value:
        raise UserError(f"{key}={value!r:.200} can't be: it isn't Unicode text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} can't be: numbers have to be finite")
    elif isinstance(value, int) and value.bit_length() > BITS:
        raise UserError(f"{key} can't be a whole number of {value.bit_length():,} bits: it has at most {BITS}")
    elif not isinstance(value, str | int | float | None):
        raise UserError(f"{key}={value!r} can't be: a {type(value).__name__} isn't a value that JSON knows")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` where a known word is near, else nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config, sections and their keys; of every choice where a section has several."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for kind in get_args(field.annotation) or (field.annotation,):
            if get_origin(field.annotation) is not dict and isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{key}.")


def sections() -> set[str]:
    """Keys that hold keys of their own, whose names are known."""
    return {key.rpartition(".")[0] for key in keys()}


def unknown_key(key: str, siblings: Iterable[str] = ()) -> str:
    """The message for a key that there isn't; ``siblings`` are those beside it."""
    section, _, last = key.rpartition(".")
    if key.startswith("experiment."):
        return f"an experiment's YAML has to begin with the line '# @package _global_', else it sets {key}"
    known = sorted(set(keys()) - set(RECORDED))
    if key in known:
        choices = " or ".join(f"{section}={choice}" for choice in _choices_with(section, last))
        comes = f"; it comes with {choices}" if choices else ""
        return f"{key} isn't a key of this {section}, which has {', '.join(siblings)}{comes}"

    def likeness(other: str) -> float:
        names = SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, other).ratio(), 0.99 * names)

    leaves = [other for other in known if other not in sections()]
    best = max(map(likeness, leaves))
    near = [other for other in leaves if likeness(other) > best - 0.02][:3] if best > 0.7 else []
    if hint := ELSEWHERE.get(last) or " or ".join(near):
        return f"unknown key {key}; did you mean {hint}?"
    inside = [other for other in known if other.startswith(f"{key.partition('.')[0]}.")]
    return f"unknown key {key}; " + (f"there are {', '.join(inside)}" if inside else "--help lists the keys there are")


def _choices_with(group: str, name: str) -> list[str]:
    """Choices of a group that have a key of this name."""
    return [
        choice
        for choice in choices_of(group)
        if re.search(rf"^{re.escape(name)}:", (HERE / group / f"{choice}.yaml").read_text(), re.MULTILINE)
    ]


def explain(error: ValidationError, data: dict[str, Any]) -> str:
    """``error``, raised for ``data``, as one line per key."""
    sentences: list[str] = []
    wanted: dict[str, tuple[Any, list[str]]] = {}  # key → its value, and what that could have been instead
    lacking: dict[str, list[str]] = {}  # group → its keys that aren't there
    for fault in error.errors(include_url=False):
        key, beside = _place(fault, data)
        if fault["type"] == "missing" and isinstance(place := fault["loc"][-1], int):
            wanted[key] = (fault["input"], [f"a list of {place + 1}"])  # the last that is missing tells its length
            continue
        group, _, name = key.partition(".")
        missing = fault["type"] == "missing" and key.count(".") == 1 and choices_of(group)
        if missing or fault["type"] == "union_tag_not_found":
            lacking.setdefault(group, []).append(name or "name")
            continue
        if group in lacking and fault["type"] == "extra_forbidden" and key in set(keys()):
            continue  # of the choice that these keys were taken from
        if fault["type"] == "union_tag_invalid":
            key, fault["input"] = f"{key}.name", fault["ctx"]["tag"]
        expected = EXPECTED.get(fault["type"])
        if expected is None or key in sections():
            sentences += _sentences(key, beside, fault)
        else:
            choices = wanted.setdefault(key, (fault["input"], []))[1]
            choices.append(expected.format(**{name: _bare(text) for name, text in fault.get("ctx", {}).items()}))
    sentences += [_line(key, value, list(dict.fromkeys(choices))) for key, (value, choices) in wanted.items()]
    sentences += [_lacks(group, names, data[group].get("name")) for group, names in lacking.items()]
    return "\n".join(dict.fromkeys(sentences))


def _lacks(group: str, names: list[str], chosen: Any) -> str:
    options = choices_of(group)
    base = chosen if chosen in options else "custom" if "custom" in options else options[0]
    return (
        f"{group} has no {', '.join(names)}: {group}={base} brings every key, and so does a YAML of your own that "
        f"begins with 'defaults: [{base}, _self_]'"
    )


def choices_of(group: str, roots: Iterable[Path] = (HERE,)) -> list[str]:
    """Choices of a group; none where it isn't one."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def _place(fault: Any, data: Any) -> tuple[str, list[str]]:
    """The key of ``fault`` without the names of union members that pydantic puts between, and the keys beside it."""
    path, beside = [], []
    for part in fault["loc"]:
        inside = isinstance(data, dict) and (part in data or (fault["type"] == "missing" and part == fault["loc"][-1]))
        if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            beside = [name for name in data if name != part] if isinstance(data, dict) else []
            data = data[part] if isinstance(data, list) else data.get(part)
            path.append(str(part))
    return ".".join(path), beside


def _sentences(key: str, beside: list[str], fault: Any) -> list[str]:
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return [unknown_key(full, beside) for full in leaves(key, value)]
    if kind == "missing":
        return [f"{key} has no value; a key can be null where its comment says so, but not be deleted"]
    if kind == "value_error":  # of a section: a sentence of its own; of a key: begins with the value
        text = str(fault["ctx"]["error"])
        return [text if key in sections() else f"{key}={text}"]
    if key in sections():
        inside = dict.fromkeys(other for other in keys() if other.startswith(f"{key}."))
        return [f"{key}={shown(value)} can't be: {key} holds {', '.join(inside)}"]
    return [f"{key}={shown(value)} can't be: {fault['msg']}"]


def _line(key: str, value: Any, choices: list[str]) -> str:
    """What the value has to be, and perhaps what was meant."""
    names = [name for choice in choices for name in choice.replace(" or ", ", ").split(", ")]
    hint = nearest(value, names) if isinstance(value, str) else ""
    if isinstance(value, float) and value.is_integer() and "a whole number" in choices:
        hint = f"; did you mean {int(value)}?"
    elif "text" in choices and isinstance(value, bool | int | float):
        text = f"'{shown(value)}'"
        in_a_list = key.rpartition(".")[2].isdecimal()  # whose places can't be given one by one
        hint = f"; in quotes it is text: {text}" if in_a_list else f"; as text: {for_shell(f'{key}={text}')}"
    return f"{key}={shown(value)} can't be: it has to be {', or '.join(choices)}{hint}"


def shown(value: Any) -> str:
    """A value as the command line takes it, its middle left out where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def quoted(text: str) -> str:
    """``text`` as one value of Hydra's grammar, which gives it back as it is.

    Within its quotes a backslash counts before a quote only, and OmegaConf later looks for ``${``.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def override(key: str, path: str) -> str:
    """An override that gives ``key`` this absolute path, in quotes only where Hydra wants them."""
    return f"{key}={path if re.fullmatch(r'/[A-Za-z0-9_/.+-]*', path) else quoted(path)}"


def for_shell(text: str) -> str:
    """``text`` as one word of a command line."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def _bare(text: Any) -> Any:
    return text.replace("'", "") if isinstance(text, str) else text


def leaves(key: str, value: Any) -> Iterator[str]:
    """Dotted keys from ``key`` down to those that hold values."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}" if key else str(name), inner)
    elif key:
        yield key
