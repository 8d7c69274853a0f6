"""Define small, seeded tasks for tests, each with a feature that fails if the batch isn't handled exactly."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset


class Counted:
    """A regression with dropout. Samples have unequal numbers of units: sample i has 1 + i mod 7."""

    def __init__(self, samples: int = 500, dropout: float = 0.2, width: int = 32) -> None:
        random = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(samples, 8, generator=random)
        self.targets = torch.randn(samples, 7, generator=random)
        self.units = 1 + torch.arange(samples) % 7
        self.dropout, self.width = dropout, width

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, self.width),
            nn.Tanh(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, 7),
            nn.Dropout(self.dropout),
        )

    def train_data(self) -> Any:
        return TensorDataset(self.inputs, self.targets, self.units)

    def val_data(self) -> Any:
        return TensorDataset(self.inputs[:37], self.targets[:37], self.units[:37])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        mask = torch.arange(7, device=units.device) < units[:, None]
        return ((model(inputs) - targets)[mask] ** 2).sum(), units.sum()


class Slow(Counted):
    """``Counted`` on a plain dataset without a fast path. Samples are fetched one by one, or many at once."""

    def __init__(self, many: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.many = many

    def train_data(self) -> Any:
        return (Many if self.many else OneByOne)(self)

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        inputs, targets, units = sample
        return inputs + 0.01 * torch.randn(inputs.shape, generator=generator), targets, units


class RecordsSamples(Slow):
    """A task that records the samples fetched for training, in a file per process."""

    def __init__(self, folder: str, **args: Any) -> None:
        super().__init__(**args)
        self.folder = folder

    def train_data(self) -> Any:
        return Recorded(self)

    def val_data(self) -> Any:
        return None


class FromFile(Counted):
    """``Counted`` with inputs from a .npy file, which is read when the task is made."""

    def __init__(self, file: str) -> None:
        inputs = torch.from_numpy(np.load(file))
        super().__init__(samples=len(inputs))
        self.inputs = inputs


class OneByOne(Dataset):
    def __init__(self, task: Counted) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task.units)

    def __getitem__(self, index: int) -> Any:
        return self.task.inputs[index], self.task.targets[index], self.task.units[index]


class Recorded(OneByOne):
    def __getitem__(self, index: int) -> Any:
        with open(f"{self.task.folder}/{os.getpid()}", "a") as file:  # type: ignore[attr-defined]
            file.write(f"{index}\n")
        return super().__getitem__(index)


class Many(OneByOne):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("[index] called instead of __getitems__")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [OneByOne.__getitem__(self, index) for index in indices]


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


class Streamed(Counted):
    def train_data(self) -> Any:
        return Endless()


class Empty(Counted):
    def train_data(self) -> Any:
        return TensorDataset(torch.zeros(0, 8))


class MeanLoss(Counted):
    """A task whose loss is a mean, as in most training code."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return F.mse_loss(model(batch[0]), batch[1])


class NoUnits(Counted):
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        return super().loss(model, batch)[0], 0


class BecomesNaN(Counted):
    """A task whose loss is NaN in one call on one rank."""

    def __init__(self, call: int = 3, rank: int = 1, **args: Any) -> None:
        super().__init__(**args)
        self.calls, self.call = 0, call if rank == int(os.environ.get("RANK", 0)) else -1

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, units = super().loss(model, batch)
        self.calls += 1
        return (loss * float("nan") if self.calls == self.call else loss), units


class AlwaysNaN(Counted):
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, units = super().loss(model, batch)
        return loss * float("nan"), units


class WithoutTrainData:
    """An invalid task that lacks train_data."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return None


class Odd(Counted):
    """A task whose model has a reassigned buffer, a frozen parameter, or weights in float64."""

    def __init__(self, kind: str = "", call: int = -1, **args: Any) -> None:
        super().__init__(**args)
        self.kind, self.call, self.calls = kind, call, 0

    def model(self) -> nn.Module:
        model = super().model()
        model[3] = nn.Linear(self.width, 7).double() if self.kind == "double" else Running(self.width)
        if self.kind == "frozen":
            model[0].bias.requires_grad_(False)
        return model.double() if self.kind == "double" else model

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        if model.training:
            self.calls += 1
        nan = self.calls == self.call and model.training
        inputs = (inputs * float("nan") if nan else inputs).to(next(model.parameters()).dtype)
        return super().loss(model, (inputs, targets, units))


class Running(nn.Linear):
    """A linear layer with a running mean of its inputs, assigned as a new tensor each time."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 7)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return super().forward(inputs - self.mean)


class Counting(torch.optim.SGD):
    """An optimizer with additional state: a number in its state_dict, or a value of a type that can't be saved."""

    def __init__(self, params: Any, lr: float, state: str = "counter") -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.count, self.kind = 0, state

    def state_dict(self) -> Any:
        return super().state_dict() | ({"count": self.count} if self.kind == "counter" else {})

    def load_state_dict(self, state_dict: Any) -> None:
        self.count = state_dict.pop("count")
        super().load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1 + self.count % 3)
                if self.kind != "counter":
                    self.state[parameter]["odd"] = (1, 2)
        return super().step(closure)


class Edited(Counted):
    """A task whose code changes with the environment variable EDITED."""

    def model(self) -> nn.Module:
        model = super().model()
        return model.double() if os.environ.get("EDITED") == "dtype" else model

    def param_groups(self, model: nn.Module) -> Any:
        first, *rest = model.parameters()
        groups = [{"params": [first]}, {"params": rest}]
        return groups if os.environ.get("EDITED") == "groups" else [{"params": [first, rest[0]]}, {"params": rest[1:]}]


class FailsToEvaluate(Counted):
    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        raise ValueError("no")


class Coupled(Counted):
    """A task with samples coupled by their micro-batch, a counter, and noise from the dataset's own generator."""

    def __init__(self, mean: bool = False, **args: Any) -> None:
        super().__init__(**args)
        self.mean, self.calls = mean, 0

    def train_data(self) -> Any:
        return Noisy(self)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        loss, units = super().loss(model, batch)
        return (loss / units if self.mean else loss + model(batch[0]).mean(0).square().sum()), units


class Noisy(OneByOne):
    def __init__(self, task: Counted) -> None:
        super().__init__(task)
        self.own = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        inputs, *rest = super().__getitem__(index)
        return inputs + np.float32(self.own.normal()), *rest
