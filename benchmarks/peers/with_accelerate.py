"""Train with Accelerate as in its documentation, and with its recipe for samples of variable size.

accelerate launch --multi_gpu --num_processes 2 -m benchmarks.peers.with_accelerate --steps 2
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

from benchmarks.peers.work import SEED, Job, Tokens, cross_entropy, main, note_seen, units

MAX_NORM = 1.0


class Progress:
    """Count the batches of a rank, as in the documentation's example, and the steps."""

    def __init__(self) -> None:
        self.batches = self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches, "steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches, self.steps = state["batches"], state["steps"]


class Training:
    """The prepared objects, and the code that both loops share."""

    def __init__(self, job: Job) -> None:
        set_seed(SEED)
        self.job = job
        self.accelerator = Accelerator(
            cpu=job.cpu,
            gradient_accumulation_steps=job.accumulation,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=job.best),
        )
        bare, data = job.begin()
        optimizer = job.optimizer(bare)
        # Accelerate steps a scheduler once per process
        schedule = job.schedule(optimizer, job.steps * self.accelerator.num_processes)
        loader: Any = DataLoader(data, batch_size=job.per_gpu, shuffle=True)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            bare, optimizer, loader, schedule
        )
        self.progress, self.ends = Progress(), list[float]()
        self.accelerator.register_for_checkpointing(self.progress)

    def update(self) -> None:
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.progress.steps += 1
            self.job.note_end(self.ends)
            if self.progress.steps == self.job.stop_at:
                self.accelerator.save_state(str(self.job.folder))

    @property
    def done(self) -> bool:
        return self.progress.steps in (self.job.stop_at, self.job.steps)

    def train_on_means(self, batches: Iterator[Any]) -> None:
        """Train an epoch with the mean loss of each batch."""
        for batch in batches:
            if isinstance(self.job.task, Tokens):
                note_seen(batch[2])
            self.progress.batches += 1
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(batch[0]), batch[1])
                self.accelerator.backward(loss)
                self.update()
            if self.done:
                return

    def train_on_sums(self, batches: Iterator[Any]) -> None:
        """Train an epoch by the recipe for samples of variable size, which counts a step's tokens in advance."""
        accumulation, ranks = self.job.accumulation, self.accelerator.num_processes
        while window := list(itertools.islice(batches, accumulation)):
            total = self.accelerator.gather(sum(units(batch[1]) for batch in window)).sum().item()
            for number, batch in enumerate(window, 1):
                if isinstance(self.job.task, Tokens):
                    note_seen(batch[2])
                self.progress.batches += 1
                accumulates = number < len(window) and ranks > 1
                with self.model.no_sync() if accumulates else nullcontext():
                    loss = cross_entropy(self.model(batch[0]), batch[1], "sum")
                    self.accelerator.backward(loss * accumulation * ranks / total)
            self.update()
            if self.done:
                return


def train(job: Job) -> list[float]:
    """Train, and return the time at the end of each step."""
    training, first, skip = Training(job), 0, 0
    accelerator, loader = training.accelerator, training.loader
    if job.resume:
        accelerator.load_state(str(job.folder))
        progress = training.progress
        # The number of a rank's batches depends on the number of ranks, which the documented example ignores.
        batches = progress.steps * job.accumulation if job.best else progress.batches
        first, skip = divmod(batches, len(loader))
    for epoch in range(first, job.epochs):
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, skip) if skip else loader
        (training.train_on_sums if job.best else training.train_on_means)(iter(rest))
        skip = 0
        if training.done:
            break
    job.keep(accelerator.unwrap_model(training.model))
    return training.ends


if __name__ == "__main__":
    main(train)
