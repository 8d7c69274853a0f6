"""Train with Lightning's automatic optimization, and with manual optimization, custom sums and a custom sampler.

torchrun --nproc-per-node=2 -m benchmarks.peers.with_lightning --steps 2
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.peers.work import SEED, Job, Tokens, cross_entropy, main, note_seen, units

MAX_NORM = 1.0


class Automatic(LightningModule):
    """A module with automatic optimization: Lightning accumulates, clips and steps, and the loss is a batch mean."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.bare, self.data = job.begin()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if isinstance(self.job.task, Tokens):
            note_seen(batch[2])
        return cross_entropy(self.bare(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.job.optimizer(self.bare)
        return [optimizer], [{"scheduler": self.job.schedule(optimizer, self.job.steps), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=self.job.per_gpu, shuffle=True)


class Manual(Automatic):
    """A module with manual optimization: sums of losses, divided by the step's units on all ranks."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.automatic_optimization = False
        self.units: Any = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(self.job.task, Tokens):
            note_seen(batch[2])
        last = (batch_idx + 1) % self.job.accumulation == 0
        strategy: Any = self.trainer.strategy
        with nullcontext() if last or self.trainer.world_size == 1 else strategy.block_backward_sync():
            self.manual_backward(cross_entropy(self.bare(batch[0]), batch[1], "sum"))
        self.units += units(batch[1])
        if last:
            self.update()

    def update(self) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        gathered: Any = self.all_gather(self.units)
        for parameter in self.bare.parameters():
            assert parameter.grad is not None
            parameter.grad *= self.trainer.world_size / gathered.sum()
        self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        self.units = 0

    def train_dataloader(self) -> Any:
        """Return a stateful loader, which can resume, with a sampler whose order is the same on any world."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's deprecation warnings
            from torchdata.stateful_dataloader import StatefulDataLoader
        sampler: Any = DistributedSampler(
            self.data, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, seed=SEED
        )
        return StatefulDataLoader(self.data, batch_size=self.job.per_gpu, sampler=sampler)


class Clock(Callback):
    """Record the time at the end of each step."""

    def __init__(self, job: Job) -> None:
        self.job, self.ends = job, list[float]()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(self.ends):
            self.job.note_end(self.ends)


def train(job: Job) -> list[float]:
    """Train, and return the time at the end of each step."""
    seed_everything(SEED, verbose=False)
    module, clock = (Manual if job.best else Automatic)(job), Clock(job)
    stop: list[Callback] = []
    if job.stop_at:
        assert job.folder
        stop = [ModelCheckpoint(dirpath=job.folder, filename="last", every_n_train_steps=job.stop_at)]
    automatic: Any = {} if job.best else {"accumulate_grad_batches": job.accumulation, "gradient_clip_val": MAX_NORM}
    trainer = Trainer(
        accelerator="cpu" if job.cpu else "gpu",
        devices=job.world,
        strategy="ddp" if job.world > 1 else "auto",
        max_steps=job.stop_at or job.steps,
        max_epochs=job.epochs,
        use_distributed_sampler=not job.best,
        callbacks=[clock, *stop],
        enable_checkpointing=bool(stop),
        enable_progress_bar=not job.best,
        enable_model_summary=False,
        logger=False,
        **automatic,
    )
    trainer.fit(module, ckpt_path=str(job.folder / "last.ckpt") if job.resume and job.folder else None)
    job.keep(module.bare)
    return clock.ends


if __name__ == "__main__":
    main(train)
