"""What other launchers call our keys and values, for error messages where the spelling is too far off to be guessed."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from isobatch.conf.keys import choices_of, locate

# Our key → their names for it. The value that was given replaces <5> where it is valid there. <5>st gives a number its
# unit, and <5>st/% gives a number below 1 the unit %.
_KEYS = {
    "duration=<10>ep": "epochs max_epochs num_epochs num_train_epochs n_epochs",
    "duration=<5000>st": "max_steps num_steps train_steps total_steps max_iters iterations steps",
    "duration=<2e9>tok": "max_tokens train_tokens total_tokens",
    "lr.peak=<0.1> or lr.base=<0.1>": "lr learning_rate max_lr base_lr optimizer.lr optimizer.learning_rate "
    "task.lr task.learning_rate",
    "lr.decay=<cosine>": "lr.schedule lr.scheduler lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "lr.decay or batch.schedule": "schedule",
    "lr.warmup=<500>st/%": "warmup warmup_steps num_warmup_steps warmup_iters lr_warmup_steps",
    "lr.warmup=<1>ep": "warmup_epochs",
    "lr.warmup=<5>%/%": "warmup_ratio warmup_fraction",
    "lr.final, as a share of the peak": "min_lr lr_min eta_min",
    "batch.global_size=<128> or batch.per_gpu=<128>": "batch_size bs batch batchsize data.batch_size",
    "batch.global_size=<128>": "train_batch_size global_batch_size total_batch_size effective_batch_size",
    "batch.per_gpu=<32>": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu "
    "batch_size_per_gpu per_gpu_batch_size device_batch_size",
    "control.most=<512>, with control=noise": "control.max control.max_batch",
    "control.least=<32>, with control=noise": "control.min control.min_batch",
    "batch.accumulation=<4>": "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accum grad_accum",
    "optimizer.weight_decay=<0.01>": "weight_decay wd",
    "optimizer.momentum=<0.9>": "momentum",
    "optimizer=<adamw>": "optim optimizers optimiser opt",
    "clip_norm=<1.0>": "gradient_clip_val max_grad_norm grad_clip gradient_clipping clip_grad",
    "seed=<0>": "random_seed seed_everything manual_seed",
    "data.workers=<4>": "num_workers dataloader_num_workers dataloader_workers",
    "device=cuda or device=cpu": "accelerator use_cuda cuda",
    "cluster.gpus_per_node=<8>": "gpus num_gpus n_gpus ngpus ngpu devices nproc_per_node nproc num_processes "
    "gpus_per_node world_size",
    "cluster.gpus_per_node=8, which gives each process its rank": "local_rank",
    "cluster.nodes=<2>": "nodes nnodes num_nodes num_machines",
    "cluster.rendezvous=node-1:29500, with cluster.nodes=2": "master_addr main_process_ip rdzv_endpoint dist_url",
    "cluster.time_min=<240>, with cluster=slurm": "time walltime time_limit",
    "task=<images>": "tasks dataset",
    "engine=<ddp>": "engines strategy backend distributed",
    "engine.stage=<2>, with engine=deepspeed": "zero_stage",
    "engine.shard, with engine=fsdp": "auto_wrap_policy transformer_layer_cls_to_wrap",
    "engine.offload, with engine=fsdp or deepspeed": "cpu_offload offload_optimizer",
    "cluster=<slurm>": "clusters",
    "experiment=<digits_large>": "experiments recipe",
    "run.name=<NAME>": "name run_name exp_name experiment_name job_name",
    "run.dir=<DIR>": "run output_dir save_dir out_dir log_dir checkpoint_dir ckpt_dir",
    "run.dir=DIR (the same command resumes by itself)": "resume resume_from resume_from_checkpoint auto_resume",
    "run.dir=DIR, to resume, or init_from=PATH, to start from its weights": "ckpt_path load_checkpoint ckpt",
    "init_from=PATH": "weights pretrained finetune_from checkpoint_path",
    "model._target_=my_package.MyModel": "model arch model_name model_name_or_path",
    "data._target_=my_package.MyData": "data",
    "checkpoint.every=<10>min": "checkpoint save_every save_interval checkpoint.interval",
    "checkpoint.every=<500>st/%": "save_steps every_n_train_steps checkpoint.steps",
    "checkpoint.every=<1>ep": "every_n_epochs checkpoint.epochs",
    "checkpoint.keep=<2>": "save_total_limit save_top_k",
    "checkpoint.best=val/loss:min": "monitor metric_for_best_model load_best_model_at_end",
    "stop.when=val/loss:min": "early_stopping early_stop",
    "stop.when=val/loss:min stop.patience=<3>": "early_stopping_patience patience early_stopping.patience",
    "stop.after=<90min>": "max_time",
    "action=evaluate init_from=DIR": "eval_only test_only",
    "evaluate.every=<1>ep": "evaluate eval_every val_every check_val_every_n_epoch evaluate.epochs",
    "evaluate.every=<500>st/%": "eval_steps eval_interval evaluate.steps evaluate.interval",
    "evaluate.every=<500>st/ep": "val_check_interval",
    "evaluate.first=true": "eval_on_start",
    "evaluate.per_gpu=<32>": "per_device_eval_batch_size eval_batch_size",
    "evaluate.samples=<1000>": "max_eval_samples eval_samples",
    "evaluate.samples, which counts samples": "eval_iters limit_val_batches",
    "log.every=<50>st/%": "log logging_steps log_every_n_steps log_interval log.steps log.interval",
    "log.every=<1>ep": "log.epochs",
    "log.to=wandb or log.to=tensorboard": "logger loggers report_to log_with tracker trackers",
    "log.to=wandb": "wandb use_wandb",
    "log.to=tensorboard": "tensorboard use_tensorboard",
    "log.to=mlflow": "mlflow use_mlflow",
    "log.to=wandb log.args.wandb.project=NAME": "wandb_project",
    "noise.every=<10>st/%": "noise noise.steps noise.interval",
    "ema=2000sa (its half-life)": "ema_decay use_ema",
    "on_nonfinite=skip": "skip_nan",
    "precision=bf16 or precision=fp16": "mixed_precision amp use_amp",
    "precision=fp16": "fp16",
    "precision=bf16": "bf16",
    "task.args.dropout=<0.1>": "dropout",
    "-m lr.peak=0.1,0.2, which starts a sweep": "tune",
    "compile=true": "torch_compile use_compile",
    "recompute=['*']": "gradient_checkpointing activation_checkpointing",
    "numerics=bitwise": "deterministic use_deterministic_algorithms",
    "action=plan, or cluster.dry_run=true with cluster=slurm": "dry_run",
}
KEYS = {name: ours for ours, names in _KEYS.items() for name in names.split()}

_TORCHS = "Adam RMSprop NAdam RAdam Adagrad Adamax Adadelta ASGD Rprop"  # of torch.optim, without sections of ours
_CUSTOM = "optimizer=custom optimizer._target_="
# Our key → their value → ours.
VALUES: dict[str, dict[str, str]] = {
    "device": {
        "gpu": "device=cuda",
        **dict.fromkeys((f"cuda:{index}" for index in range(16)), "device=cuda (CUDA_VISIBLE_DEVICES chooses which)"),
    },
    "action": {
        **dict.fromkeys(("resume", "restart", "continue"), "the same command again, which resumes, or run.dir=DIR"),
        **dict.fromkeys(("fit", "run", "start"), "action=train"),
        **dict.fromkeys(("eval", "test", "validate", "val"), "action=evaluate init_from=DIR"),
        **dict.fromkeys(("submit", "slurm"), "cluster=slurm, which submits the training"),
        "sweep": "-m, which starts a sweep",
        "list": "action=runs",
    },
    "precision": {
        **dict.fromkeys(("16", "amp", "mixed"), "precision=bf16 or precision=fp16"),
        **dict.fromkeys(("bfloat16", "bf16-mixed"), "precision=bf16"),
        **dict.fromkeys(("float16", "half", "16-mixed"), "precision=fp16"),
        **dict.fromkeys(("32", "float32", "full", "32-true", "no"), "precision=fp32"),
    },
    "lr.decay": dict.fromkeys(("none", "null", "off", "constant_with_warmup"), "lr.decay=constant"),
    "optimizer": {name.lower(): f"{_CUSTOM}torch.optim.{name} lr.peak=0.001" for name in _TORCHS.split()}
    | {"adamw_torch": "optimizer=adamw", "adamw_torch_fused": "optimizer=adamw"}
    | {"adam": f"optimizer=adamw, or {_CUSTOM}torch.optim.Adam lr.peak=0.001"},
    "engine": {
        "fsdp2": "engine=fsdp",
        "zero": "engine=deepspeed engine.stage=2",
        **{
            f"{name}{stage}": f"engine=deepspeed engine.stage={stage}"
            for name in ("deepspeed_stage_", "zero")
            for stage in (1, 2, 3)
        },
    },
}


def our_key(key: str, value: Any = None) -> str:
    """Return the overrides that mean what ``key=value`` means elsewhere; empty if that isn't known, or is off.

    >>> our_key("epochs", 5), our_key("warmup", 0.1), our_key("warmup", "5ep")
    ('duration=5ep', 'lr.warmup=10%', 'lr.warmup=5ep')
    """
    if str(value).lower() == "false":  # what is off there has no key here
        return ""
    found = KEYS.get(key, "")
    given = str(value) if isinstance(value, str | int | float) and value is not True else ""
    if choice := our_value(found.partition("=")[0], given):
        return choice
    ways = found.split(" or ")
    if (way := f"{ways[0].partition('=')[0]}={given}") in ways:
        return way

    def with_value(example: re.Match[str]) -> str:
        ours, usual, unit, share = example.groups(default="")
        fitting = [text for text in _ways(given, unit, share) if _fits(ours, text)]
        return f"{ours}={fitting[0] if fitting else usual + unit}"

    return re.sub(r"([\w.]+)=<(.*?)>(\w*%?)(?:/([\w%]+))?", with_value, found)


def _ways(given: str, unit: str, share: str) -> list[str]:
    """Return ``given`` as a value of ours, by an example's ``unit`` and the unit of a number below 1, ``share``."""
    if not re.fullmatch(r"[\d.]+(e[+-]?\d+)?", given):
        return [given, given.lower()] if re.fullmatch(r"[\w./%+-]+", given) else []
    number = float(given)
    if not unit:
        return [_plain(number)]
    if number >= 1 or (number > 0 and unit in ("ep", "min")):
        return [f"{_plain(number)}{unit}"]
    share_of_it = f"{100 * number:g}" if share == "%" else _plain(number)
    return [f"{share_of_it}{share}"] if number > 0 and share else []


def _plain(number: float) -> str:
    return repr(number).removesuffix(".0")


def _fits(key: str, text: str) -> bool:
    """Return whether ``text`` is a valid value of ``key``."""
    if choices := choices_of(key):
        return text in choices
    if (key == "duration" and text.endswith("%")) or (key == "optimizer.momentum" and text == "0"):
        return False  # rejected by the plan: a share of itself; and by optimizer.nesterov
    try:
        number = float(text)
        value: str | float = int(number) if text.isdecimal() else number
    except ValueError:
        value = text
    return takes(key, value)


def takes(key: str, value: Any) -> bool:
    """Return whether ``value`` is a valid value of ``key``."""
    place = locate(key.split("."))
    try:
        TypeAdapter(place.kind).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def our_value(key: str, value: Any) -> str:
    """Return the overrides that mean what this value of ``key`` means elsewhere; empty if that isn't known."""
    return VALUES.get(key, {}).get(str(value).lower(), "")
