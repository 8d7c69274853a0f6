"""Train with transformers' Trainer: a model that returns a mean loss, and a model that uses num_items_in_batch.

torchrun --nproc-per-node=2 -m benchmarks.peers.with_transformers --steps 2
"""

from __future__ import annotations

import tempfile
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.peers.work import SEED, Job, cross_entropy, main, note_seen


class WithLoss(nn.Module):
    """A model that returns the mean loss of its batch."""

    def __init__(self, bare: nn.Module) -> None:
        super().__init__()
        self.bare = bare

    def forward(self, inputs: Tensor, labels: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        if index is not None:
            note_seen(index)
        logits = self.bare(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class WithCount(WithLoss):
    """A model like the library's own, which gets the number of labels in the step's passes on all ranks."""

    def forward(self, inputs: Tensor, labels: Tensor, index: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        if index is not None:
            note_seen(index)
        logits = self.bare(inputs)
        return {"loss": cross_entropy(logits, labels, "sum") / kwargs["num_items_in_batch"], "logits": logits}


class Named(Dataset):
    """Samples as a dictionary of the arguments of the model's forward."""

    NAMES = ("inputs", "labels", "index")

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(self.NAMES, self.data[index], strict=False))


class Clock(TrainerCallback):
    """Record the time at the end of each step, and stop with a checkpoint after the job's ``stop_at``."""

    def __init__(self, job: Job) -> None:
        self.job, self.ends = job, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.note_end(self.ends)
        if state.global_step == self.job.stop_at:
            control.should_save = control.should_training_stop = True


def train(job: Job) -> list[float]:
    """Train, and return the time at the end of each step."""
    bare, data = job.begin()
    model = (WithCount if job.best else WithLoss)(bare)
    optimizer, clock = job.optimizer(model), Clock(job)
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(job.folder or temporary)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=job.per_gpu,
            gradient_accumulation_steps=job.accumulation,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=job.best,
            use_cpu=job.cpu,
            dataloader_pin_memory=not job.cpu,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False if job.best else None,  # as torch's warning advises
            seed=SEED,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Named(data),
            optimizers=(optimizer, job.schedule(optimizer, job.steps)),
            callbacks=[clock],
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if job.resume else None)
    job.keep(bare)
    return clock.ends


if __name__ == "__main__":
    main(train)
