"""Check a config; every mistake in it is reported: the key with its value, and what works."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from pydantic import ValidationError

from isobatch.conf import keys as schema
from isobatch.conf.keys import RECORDED, Place, choices_of, keys, leaves, locate, sections
from isobatch.conf.schema import RunConfig
from isobatch.scaling.errors import UserError
from isobatch.scaling.reading import MOST_DEPTH as READ_DEPTH

DEEPEST = READ_DEPTH // 2  # lists and mappings in a value: what is written here is read back
BITS = 64  # of a whole number; tools that read the config hold no longer one
SHOWN = 400  # characters of a value in a message
DELETED = "a key can be null where its comment says so, but not be deleted"

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


def validated(plain: dict[str, Any]) -> RunConfig:
    """Return ``plain`` as a RunConfig.

    Raises:
        UserError: it isn't one.
    """
    _check_values("", plain)
    try:
        return RunConfig.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise _joined(_explained(error, plain)) from None


def _joined(errors: list[UserError]) -> UserError:
    """Return one error for all: about the key of the first, with a line for each."""
    first = errors[0]
    return first if len(errors) == 1 else UserError("\n".join(map(str, errors)), key=first.key, value=first.value)


def _check_values(key: str, value: Any, depth: int = 0) -> None:
    """Raise UserError for what JSON can't say without a loss: free mappings may hold anything, and all is hashed."""
    if depth > DEEPEST:
        raise UserError(f"{key:.100}… can't be", f"it is nested more than {DEEPEST} deep", key)
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r}", f"keys have to be text, as '{name}' in quotes", key)
            _check_values(f"{key}.{name}" if key else name, inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(f"{key}.{index}", inner, depth + 1)
    elif value == "???":
        raise UserError(f"{key} has to be given", f"{key}=…", key)
    elif isinstance(value, str) and not value.isascii() and value.encode("utf-8", "ignore").decode() != value:
        raise UserError(f"{key}={value!r:.200} can't be", "it isn't Unicode text", key, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} can't be", "numbers have to be finite", key, value)
    elif isinstance(value, int) and value.bit_length() > BITS:
        problem = f"{key} can't be a whole number of {value.bit_length():,} bits"
        raise UserError(problem, f"it has at most {BITS}", key, value)
    elif not isinstance(value, str | int | float | None):
        problem = f"{key}={value!r:.200} can't be"
        raise UserError(problem, f"a {type(value).__name__} isn't a value that JSON knows", key, value)


def _explained(error: ValidationError, data: dict[str, Any]) -> list[UserError]:
    """Return what is wrong with ``data``, an error for each key."""
    found: dict[str, UserError] = {}
    lacking: dict[str, list[str]] = {}  # group → its keys that aren't there
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        if kind == "missing" and isinstance(location[-1], int):  # of a list that is too short
            kind, location = "too_short", location[:-1]
        place = locate(location)
        group, _, name = place.key.partition(".")
        if kind == "union_tag_not_found" or (kind == "missing" and name and "." not in name and choices_of(group)):
            lacking.setdefault(group, []).append(name or "name")
        elif kind == "extra_forbidden" and not (group in lacking and place.key in keys()):  # else of another choice
            found |= {key: unknown_key(key, place) for key in leaves(place.key, fault["input"])}
        elif kind == "missing":
            found[place.key] = UserError(f"{place.key} has no value", DELETED, place.key)
        elif kind == "union_tag_invalid":
            key = f"{place.key}.name"
            found[key] = _wrong(Place(key, place.kind, place.section), fault["ctx"]["tag"])
        elif kind == "value_error":
            found[place.key] = _own(place.key, fault, data)
        elif kind != "extra_forbidden":
            found[place.key] = _wrong(place, fault["input"])
    return [*found.values(), *(_lacks(group, names, data[group].get("name")) for group, names in lacking.items())]


def _own(place: str, fault: Any, data: Any) -> UserError:
    """Return what a check of our own found: of a section as it is, of a key behind that key."""
    error = fault["ctx"]["error"]
    if place and place not in sections():
        equals = ": " if fault["loc"][-1] == "[key]" else "="
        return UserError(f"{place}{equals}{error.problem}", error.fix, place, fault["input"])
    for name in error.key.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return UserError(error.problem, error.fix, error.key, data)


def _wrong(place: Place, value: Any) -> UserError:
    """Return what a value has to be, and perhaps what was meant."""
    key, names, allowed = place.key, schema.names(place.kind), schema.allowed(place.kind)
    problem = f"{key}={shown(value)} can't be"
    if key in sections():
        inside = [other for other in keys() if other.startswith(f"{key}.")]
        return UserError(problem, f"{key} holds {', '.join(inside)}", key, value)
    hint = nearest(value, names) if isinstance(value, str) else ""
    if isinstance(value, float) and value.is_integer() and any("whole" in phrase for phrase in allowed):
        hint = f"did you mean {int(value)}?"
    elif any(phrase.startswith("text") for phrase in allowed) and isinstance(value, bool | int | float):
        text = f"'{shown(value)}'"
        in_a_list = key.rpartition(".")[2].isdecimal()  # whose places can't be given one by one
        hint = f"in quotes it is text: {text}" if in_a_list else f"as text: {for_shell(f'{key}={text}')}"
    fix = f"it has to be {', or '.join(allowed)}"
    return UserError(problem, f"{fix}; {hint}" if hint else fix, key, value)


def _lacks(group: str, names: list[str], chosen: Any) -> UserError:
    options = choices_of(group)
    base = chosen if chosen in options else "custom" if "custom" in options else options[0]
    return UserError(
        f"{group} has no {', '.join(names)}",
        f"{group}={base} brings every key, and so does a YAML of your own that begins with "
        f"'defaults: [{base}, _self_]'",
        f"{group}.{names[0]}",
    )


def unknown_key(key: str, place: Place | None = None) -> UserError:
    """Return the error for a key that there isn't.

    Args:
        place: where it was found.
    """
    section, _, last = key.rpartition(".")
    if key.startswith("experiment."):
        problem = f"an experiment's YAML sets {key}"
        return UserError(problem, "it has to begin with the line '# @package _global_'", key)
    known = sorted(set(keys()) - set(RECORDED))
    if key in known and place:
        choices = " or ".join(f"{section}={choice}" for choice in schema.choices_with(section, last))
        problem = f"{key} isn't a key of this {section}, which has {', '.join(schema.fields(place.section))}"
        return UserError(problem, f"it comes with {choices}" if choices else "", key)

    def likeness(other: str) -> float:
        names = SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, other).ratio(), 0.99 * names)

    leaves = [other for other in known if other not in sections()]
    best = max(map(likeness, leaves))
    near = [other for other in leaves if likeness(other) > best - 0.02][:3] if best > 0.7 else []
    if hint := ELSEWHERE.get(last) or " or ".join(near):
        return UserError(f"unknown key {key}", f"did you mean {hint}?", key)
    inside = [other for other in known if other.startswith(f"{key.partition('.')[0]}.")]
    fix = f"there are {', '.join(inside)}" if inside else "--help lists the keys there are"
    return UserError(f"unknown key {key}", fix, key)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` where a known word is near, else nothing."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """Return a value as the command line takes it, its middle left out where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def for_shell(text: str) -> str:
    """Return ``text`` as one word of a command line."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
