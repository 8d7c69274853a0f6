"""Test a step on a pretended accelerator, which needs no GPU.

Its tensors have shapes and devices, but no values. An operation that needs a value on the host raises
DataDependentOutputException: on a GPU it would wait for the device. One that mixes devices raises, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from isobatch.conf.compose import compose
from isobatch.scaling.plan import Step
from isobatch.scaling.planning.resolve import resolve
from isobatch.trainers.data.fetch import to_device
from isobatch.trainers.data.loader import Loader, Micro
from isobatch.trainers.engines.make import make_engine
from isobatch.trainers.engines.step_report import Requests
from isobatch.trainers.loop.fit import Stepper
from isobatch.trainers.loop.readback import DelayedReadback
from isobatch.trainers.model import randomness
from isobatch.trainers.model.build import prepare
from isobatch.trainers.model.dropout import row_keys
from isobatch.trainers.model.randomness import Stream
from isobatch.trainers.ranks.watch import Watch
from isobatch.trainers.ranks.world import World
from isobatch.trainers.tasks.task import Task
from tests.support.harness import in_ranks

BASE = ("task=custom", "task._target_=tests.support.tasks.Counted", "batch.global_size=12", "batch.per_gpu=6")
BASE += ("duration=4st", "lr.peak=0.01", "clip_norm=1")
CASES = {
    "SGD": ("optimizer=sgd",),
    "AdamW": ("optimizer=adamw",),
    "LAMB": ("optimizer=lamb",),
    "LARS": ("optimizer=lars",),
    "Muon": ("optimizer=muon",),
    "noise": ("noise.every=1st",),
    "noise of two halves": ("noise.every=1st", "noise.parts=2"),
    "average": ("ema=24sa",),
}


class Net(nn.Sequential):
    """Layers on the accelerator, where they have no values."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        bare = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        tensors[name] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare

    def _apply(self, fn: Any, recurse: bool = True) -> Net:
        """Stay where it is: tensors without values can't be swapped."""
        return self


class Classes:
    """A task whose loss may wait for the device."""

    def __init__(self, device: torch.device, waits: str) -> None:
        self.device, self.waits = device, waits

    def model(self) -> nn.Module:
        return Net(self.device)

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(torch.empty(48, 8), torch.empty(48, dtype=torch.int64))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
        if self.waits == "float":
            float(loss)
        if self.waits == "to":
            loss = loss + torch.zeros(()).to(self.device)
        return loss, len(labels)


class Untouched(Stream):
    """A stream without its look at the generators, which are on the host, whose tensors have no values here either."""

    def stop(self) -> None: ...


class Waits(RuntimeError):
    """The host waits for the device."""


class NoWaits(TorchDispatchMode):
    """Raise ``Waits`` for a copy between host and device that isn't asynchronous."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if source.device != result.device and not asynchronous:
                raise Waits(f"copy from {source.device} to {result.device}")
        return result


def pretended_device() -> torch.device:
    """Create the accelerator, in a process that ends after the test."""
    _setup_privateuseone_for_python_backend("pretended")
    randomness.draw = lambda generator: 0  # as in Untouched
    return torch.device("pretended", 0)


def steps(*overrides: str, waits: str = "") -> Callable[[World], str]:
    """Return a function that takes two steps on the pretended accelerator, and returns where their results are."""

    def body(_: World) -> str:
        library = torch.library.Library("aten", "IMPL")
        library.impl("_fused_sgd_", lambda *args, **options: None, "Meta")  # torch lacks the shapes of its results
        device = pretended_device()
        world = World(0, 1, 0, 1, device, None)
        config = compose([*BASE, *overrides])
        plan = resolve(config, 1, 48)
        stream = Untouched(0, device)

        def micros(step: Step) -> Iterator[Micro]:
            before, size = 0, step.stop - step.start
            for cut in step.parts:
                for start, stop in ((before + a, before + b) for a, b in cut.passes(0)):
                    samples, last = stop - start, stop == before + cut.global_size
                    batch = to_device((torch.empty(samples, 8), torch.zeros(samples, dtype=torch.int64)), device)
                    yield Micro(start, stop, samples, samples, cut, last, stop == size, 0.0, batch)
                before += cut.global_size

        with FakeTensorMode():
            own = Classes(device, waits)
            task, model = Task(own), prepare(own.model(), config, stream, 1)
            engine = make_engine(config, task, model, plan.peak, world)
            stepper = Stepper(engine, cast(Loader, micros), stream, Watch(), clip_norm=1.0)
            with NoWaits():
                for index in range(2):
                    step = plan.step_at(12 * index)
                    assert step is not None
                    total, update = stepper.take(step, lambda: Requests())
                assert DelayedReadback(device).read(step, total, update) is None
        return f"{total.loss.device} {torch.as_tensor(update.grad_norm).device}"

    return body


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_step_waits_for_the_device(tmp_path: Path, name: str) -> None:
    assert in_ranks(1, steps(*CASES[name]), tmp_path) == ["pretended:0 pretended:0"]


@pytest.mark.parametrize("rows", [12, 13])
def test_the_keys_of_compiled_masks_do_not_wait(tmp_path: Path, rows: int) -> None:
    """Six samples have two rows each; 13 rows fit no sample."""

    def body(_: World) -> list[int]:
        device = pretended_device()
        stream = Untouched(0, device, tell=lambda reason: None)
        with FakeTensorMode(), NoWaits():
            stream.start(0, 6)
            keys = row_keys(stream, 3, rows, 8, channels=False)
        assert keys.device == device
        return list(keys.shape)

    assert in_ranks(1, body, tmp_path) == [[3, rows, 1]]


def test_adafactor_of_torch_waits(tmp_path: Path) -> None:
    """The page on GPUs says so."""
    assert in_ranks(1, steps("optimizer=adafactor"), tmp_path)[0]["raised"] == "DataDependentOutputException"


@pytest.mark.parametrize("wait", ["float", "to"])
def test_waiting_is_noticed(tmp_path: Path, wait: str) -> None:
    end = in_ranks(1, steps(waits=wait), tmp_path)[0]
    assert end["raised"] == {"float": "DataDependentOutputException", "to": "Waits"}[wait]
