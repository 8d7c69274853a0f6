"""Compare the errors of wrong command lines with ``tests/golden/messages.txt``, which ``make golden`` rewrites."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from isobatch.conf.compose import compose, refuse_typo
from isobatch.conf.hardware import refuse_unless_startable
from isobatch.conf.help import command_line
from isobatch.conf.saved import dump
from isobatch.conf.sweep import expand, sweep_directories
from isobatch.scaling.errors import UserError
from isobatch.scaling.planning.automatic import configured
from tests.support.golden import golden

FILES = {
    "mine/task/broken.yaml": "name: [a\n",
    "mine/task/list.yaml": "- a\n",
    "mine/task/short.yaml": "name: short\n",
    "mine/task/typo.yaml": "name: typo\n_target_: a.B\ntrain_sample: 3\n",
    "mine/optimizer/nameless.yaml": "eps: 1.0e-6\n",
    "mine/experiment/headless.yaml": "batch: {global_size: 8}\nduration: 5ep\n",
    "mine/experiment/plain_task.yaml": "# @package _global_\ntask: images\n",
    "mine/experiment/no_override.yaml": "# @package _global_\ndefaults:\n  - task: images\n",
    "mine/experiment/unpackaged.yaml": "defaults:\n  - override /task: images\n",
    "mine/experiment/typo.yaml": "# @package _global_\ndefaults:\n  - override /optimizer: adm\n",
    "mine/experiment/other.yaml": "# @package _global_\noptimizer: {name: adamw}\n",
    "ours/optimizer/sgd.yaml": "",
    "runs/damaged/config.yaml": "- a\n",
    "runs/newer/config.yaml": "format: 2\ngiven: []\n",
}
WRONG = r"""
--confg-dir mine
--batch.global_size=128
-lr 0.1
--epochs 5
--optimizer adam
--logger wandb
batch.global_size = 128
batch.global_size= 128
batch.global_size =128
duration=5 ep
batch.schedule=0sa:64 50%:256
strategy=deepspeed_stage_2
optim=adamw_torch
fp16=true
warmup=500
warmup=5%
warmup=0.1
max_steps=-1
evaluate.steps=500
log.wandb=true
task=0.5
monitor=val_loss
task.width=32
--machine_rank=0
task=my_package.tasks.Mine
batch=128
device=gpu
action=resume
lr.schedule=cosine
lr.decay=none
name=foo
tasks=images
gpus=2
warmup_steps=500
logger=wandb
log.to=[wandb,tensorbord]
log.args.project=x
log.args.wandb.project=x
log.to=wandb log.args.wandb.projct=x
log.to=mlflow log.args.mlflow.experiment=5
early_stopping=true
optimizer=adam
optimizer.lr=0.1
task=mnist
"batch.global_size='64'"
precision=16
evaluate=2ep
checkpoint=500st
model=resnet50
trainer.max_epochs=5
--config-dir mine experiment=plain_task
--config-dir mine experiment=no_override
stop.after=90
checkpoint.every=5
lr.warmup=0.05
--config-dir mine experiment=unpackaged
--cfg all
--config-dir nowhere
--config-dir ours
seed
=3
'a b=3'
'run.name=a b(c'
'task.args.x=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1'
hydra.run.dir=x
batch.globl_size=3
global_size=3
every=3ep
foo=3
foo.bar=3
lr.foo=1
lr=0.1
epochs=3
batch_size=3
resume=true
given=[a]
optimizer=adamw optimizer.momentum=0.5
engine.stage=2
+batch.global_size=3
+task=digits
~seed
~foo
~batch.per_gpu
optimizer@other=adamw
optimizer=adm
task=3
experiment=foo
task=custom
optimizer.name=adamw
optimizer.name=foo
--config-dir mine task=mne
--config-dir mine task=broken
--config-dir mine task=list
--config-dir mine task=short
--config-dir mine task=typo
--config-dir mine optimizer=nameless
--config-dir mine experiment=headless
--config-dir mine experiment=typo
--config-dir mine experiment=other
'task.name=${foo}'
'task.name=${oc.env:ISOBATCH_NOT_SET}'
seed=x batch.per_gpu=0
seed=-1
batch.global_size=0
batch.global_size=2.5
batch.global_size=1000.0
batch.global_size=al
batch.global_size=null
batch.per_gpu=0.5
batch.even=yes
batch.unit=token
batch.schedule=bogus
action=tun
device=gpu
lr.rule=sqr
lr.decay=cos
lr.final=1.1
lr.base=-1
lr.milestones=30%
lr.milestones=[4]
clip_norm=0
duration=10
duration=10xx
duration=-1ep
duration=10min
checkpoint.every=1h
checkpoint.every=0min
ema=0.999
ema=5min
log.every=0st
checkpoint.best=val/accuracy
checkpoint.best=f1
stop.when=val/f1
stop.at=val/f1
stop.at=loss<=0.9
stop.at=val/f1>=high
stop.att=val/f1>=0.9
stop.after=0min
action=report run.dir=[sw/batch=32,seed=0,sw/batch=64,seed=0]
init_from=3
run.name=a/b
run.dir=
task._target_=foo
task.args={1:a}
task.args=3
task.args.x=nan
task.args.x=1000000000000000000000
task.tuned.sgd.lr=0
task.family=imags
cluster.rendezvous=foo cluster.nodes=2
cluster.rendezvous=a:0 cluster.nodes=2
cluster.environment.A-B=x
cluster.environment.X=true
optimizer.momentum=1
optimizer=adamw optimizer.betas=[0.9]
optimizer=lamb optimizer.trust_clip=[2,1]
recompute=[true]
lr.rule=power
lr.power=2
lr.rule=noise
lr.noise_scale=3
lr.decay=step lr.milestones=[]
control=noise batch.per_gpu=32 control.every=1min
control=noise control.eta=1
control=nois
control.every=1%
action=tune tune.parts=[speeed]
action=tune tune.parts=speeed
action=tune tune.parts=[]
model.args.x=3
data.args.x=3
task.args.x=3 task.local.x=4
optimizer.momentum=0
optimizer.args.lr=1
optimizer.args.momentum=0.5
batchnorm.mode=ghost
batchnorm.ghost_size=32
batch.schedule='0sa:64 50%:256' batch.accumulation=2
cluster.rendezvous=a:29500
cluster=slurm cluster.time_min=1
engine=fsdp engine.reduce_dtype=bf16
engine=deepspeed engine.stage=0 engine.offload=true
checkpoint.best=ema/loss:min
data._target_=a.B evaluate.first=true
output=json
action=evaluate
action=evaluate init_from=no/where
action=evaluate run.dir=runs/there
optimizer=auto lr.base=0.1
optimizer=auto batch.global_size=all task.train_samples=null
run.dir=runs/ther
run.dir=runs/damaged
run.dir=runs/newer
run.dir=runs/there seed=3
run.dir=runs/there duration=1ep
run.config=runs/there/config.yaml seed=3
debug=true cluster.gpus_per_node=2
cluster.nodes=2
device=cuda cluster.environment.CUDA_VISIBLE_DEVICES=''
cluster=slurm cluster.gpus_per_node=2 cluster.nodes=0
cluster=slurm cluster.gpus_per_node=2 cluster.time_min=2
cluster=slurm cluster.gpus_per_node=2 cluster.partition='a b'
cluster=slurm cluster.gpus_per_node=2 cluster.extra=[exclusive]
cluster=slurm cluster.gpus_per_node=2 cluster.gres=gpu:2
cluster=slurm cluster.gpus_per_node=2 cluster.rendezvous=a:1
cluster=slurm cluster.gpus_per_node=2 action=evaluate init_from=/
cluster.rendezvous=127.0.0.1:99999 cluster.nodes=2
task=custom
-m batch.global_size=8,-8
-m run.dir=a,b
-m action=train,plan
-m +experiment=digits_large
-m run={dir:a},{dir:b}
--cfg hydra
seed=1,2
-m lr.base=interval(0,1)
-m seed=range(3,1)
-m seed=range(1,100000)
-m run.name=a,b
-m action=evaluate init_from=runs/there,runs/there
-m seed=1,2 run.dir=runs/there
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the working directory of the commands: a user's YAML files, and runs."""
    for name, content in {**FILES, "runs/there/config.yaml": dump(compose([])), "runs/there/plan.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISOBATCH_NOT_SET", raising=False)
    return tmp_path


def answer(line: str) -> str:
    """Return the error that rejects the command ``line`` before anything starts."""
    try:
        args = command_line(shlex.split(line))
        if args.multirun:
            elements = expand(args.overrides, args.config_dir)
            configs = [configured(element.overrides, args.config_dir) for element in elements]
            sweep_directories(configs, [element.swept for element in elements])
        else:
            config = configured(args.overrides, args.config_dir)
            refuse_typo(args.overrides, config)
            refuse_unless_startable(config)
    except UserError as error:
        return str(error)
    raise AssertionError(f"{line} is accepted")


def test_messages_equal_their_golden_file(folder: Path) -> None:
    answers = {line: answer(line).replace(str(folder), "HERE") for line in WRONG.strip().splitlines()}
    golden("messages", "\n\n".join(f"$ python launch.py {line}\n{message}" for line, message in answers.items()) + "\n")
    for line, message in answers.items():
        assert not any(word in message for word in ("pydantic", "hydra.cc", "ConfigKeyError", "Traceback")), line
        assert len(message) < 600, line
