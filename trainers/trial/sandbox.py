"""Call a task and its model before step 1 in a sandbox: every call finds the same state, and nothing remains of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from isobatch.trainers.data.fetch import to_device
from isobatch.trainers.model.randomness import generator_of, generators_kept, generators_state, key_forward
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.trial.untouched import Copies, copied

Result = TypeVar("Result")


class Sandbox:
    """Within, task and model compute on copies; afterwards all is as it was, bit by bit.

    Args:
        seed: of the run, by which what a forward draws is keyed.
        beat: called after every call.

    Attributes:
        drew: some call drew random numbers.
        narrow: some module computed in fewer than 32 bits.
    """

    def __init__(self, task: Task, model: nn.Module, device: torch.device, seed: int, beat: Callable[[], None]) -> None:
        self.task, self.model, self.device = task, model, device
        self._seed, self._beat = seed, beat
        copies = Copies(task.own, model, device)
        self._held, self.reset, self.moved_by = copies.held, copies.reset, copies.moved_by
        self.drew = self.narrow = False

    def __enter__(self) -> Sandbox:
        with ExitStack() as stack:  # which undoes all of it where the device has no room for the copies
            if self.device.type != "cpu":
                stack.callback(torch.accelerator.empty_cache)
            stack.enter_context(generators_kept(self.device))
            stack.enter_context(self._held())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # training gives those that matter,
            stack.enter_context(redirect_stdout(StringIO()))  # and prints what the task prints
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(register_module_forward_hook(self._note_narrow).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def call(self, work: Callable[[Any], Result], batch: Any, start: int) -> Result:
        """Return what ``work`` gives for a copy of ``batch``, whose first sample is at position ``start``."""
        key_forward(self._seed, start, self.device)
        before = self._generators()
        result = work(to_device(copied(batch), self.device))  # a loss may write to its inputs
        self.drew = self.drew or self._generators() != before
        self._beat()
        return result

    def _note_narrow(self, module: nn.Module, args: Any, output: Any) -> None:
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dtype.itemsize < 4:
                self.narrow = True

    def _generators(self) -> Any:
        accelerator = generator_of(self.device)
        return generators_state(), bytes(accelerator.get_state().numpy()) if accelerator else b""


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
