"""Call a task and its model before step 1 in a sandbox: every call finds the same state, and nothing remains of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from isobatch.trainers.data.transfer import to_device
from isobatch.trainers.model.randomness import generator_of, generators_kept, generators_state, key_forward
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.trial.untouched import Attributes, Copies, comparable, moved

Result = TypeVar("Result")


class Sandbox:
    """Within, the model computes on copies of its tensors; afterwards all is as it was, bit by bit.

    Args:
        seed: of the run, by which what a forward draws is keyed.
        beat: called after every call.

    Attributes:
        drew: some call drew random numbers.
        narrow: some module computed in fewer than 32 bits.
    """

    def __init__(self, task: Task, model: nn.Module, device: torch.device, seed: int, beat: Callable[[], None]) -> None:
        self.task, self.model = task, model
        self._device, self._seed, self._beat = device, seed, beat
        self._attributes = Attributes(task.own, model)
        apart = self._attributes.modules_apart_from(model)  # a teacher or a loss network, say
        self._copies = [Copies(model, device), *(Copies(one, without=model) for one in apart)]
        self.drew = self.narrow = False

    def __enter__(self) -> Sandbox:
        with ExitStack() as stack:  # which undoes all of it where the device has no room for the copies
            stack.callback(self._free)
            stack.enter_context(generators_kept(self._device))
            stack.callback(self._attributes.restore)
            for copies in self._copies:
                stack.enter_context(copies)
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # training gives those that matter,
            stack.enter_context(redirect_stdout(StringIO()))  # and prints what the task prints
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(register_module_forward_hook(self._note_narrow).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _free(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    def call(self, work: Callable[[Any], Result], batch: Any, start: int) -> Result:
        """Return what ``work`` gives for a copy of ``batch``, whose first sample is at position ``start``."""
        key_forward(self._seed, start, self._device)
        before = self._generators()
        result = work(to_device(_copied(batch), self._device))
        self.drew = self.drew or self._generators() != before
        self._beat()
        return result

    def reset(self) -> None:
        """Let the next call find the attributes and buffers that the first one found."""
        self._attributes.restore()
        for copies in self._copies:
            copies.reset_buffers()

    def moved_by(self, call: Callable[[], Any]) -> list[str]:
        """Call it twice and return the names of the numbers that the second call moves; the first may fill caches."""
        states = []
        for _ in range(2):
            call()
            buffers = {("model", name): comparable(buffer) for name, buffer in self.model.named_buffers()}
            states.append(self._attributes.numbers() | buffers)
        return moved(*states)

    def _note_narrow(self, module: nn.Module, args: Any, output: Any) -> None:
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dtype.itemsize < 4:
                self.narrow = True

    def _generators(self) -> Any:
        accelerator = generator_of(self._device)
        return generators_state(), bytes(accelerator.get_state().numpy()) if accelerator else b""


def _copied(batch: Any) -> Any:
    """Copy a batch if it can be copied: the loss may write to its inputs."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute in fp32 without the shortcuts that a user may allow: their rounding would hide what is looked for.

    torch has two interfaces to them. The older one can't be read where a task has used the newer one, and is then left.
    """
    cuda, cpu = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    places: list[Any] = [torch.backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    before, benchmark = [place.fp32_precision for place in places], cuda.benchmark
    older: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False),
    ]
    with ExitStack() as stack:
        for place, precision in zip(places, before, strict=True):
            stack.callback(setattr, place, "fp32_precision", precision)
        for get, put, exact in older:
            with suppress(RuntimeError):
                stack.callback(put, get())
                put(exact)
        stack.callback(setattr, cuda, "benchmark", benchmark)
        cuda.benchmark = False
        for place in places:
            place.fp32_precision = "ieee"
        yield
