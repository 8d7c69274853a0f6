"""Call a task and its model in a sandbox before step 1: every call starts from the same state and leaves no trace."""

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
from isobatch.trainers.ranks.internals import get_cudnn_tf32, set_cudnn_tf32
from isobatch.trainers.tasks.task import Task
from isobatch.trainers.trial.untouched import Copies, copied

Result = TypeVar("Result")


class Sandbox:
    """Run task and model on copies of their state; on exit the original state is restored bit by bit.

    Args:
        seed: the run's seed, which keys the random numbers of a forward.
        beat: called after every call.

    Attributes:
        drew: a call drew random numbers.
        narrow: a module computed in fewer than 32 bits.
    """

    def __init__(self, task: Task, model: nn.Module, device: torch.device, seed: int, beat: Callable[[], None]) -> None:
        self.task, self.model, self.device = task, model, device
        self._seed, self._beat = seed, beat
        copies = Copies(task.own, model, device)
        self._held, self.reset, self.moved_by = copies.held, copies.reset, copies.moved_by
        self.drew = self.narrow = False

    def __enter__(self) -> Sandbox:
        with ExitStack() as stack:  # undoes everything if the device has no room for the copies
            if self.device.type != "cpu":
                stack.callback(torch.accelerator.empty_cache)
            stack.enter_context(generators_kept(self.device))
            stack.enter_context(self._held())
            # training repeats the warnings and the output of the task
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(register_module_forward_hook(self._note_narrow).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def call(self, work: Callable[[Any], Result], batch: Any, start: int) -> Result:
        """Return the result of ``work`` on a copy of ``batch``, whose first sample is at position ``start``."""
        key_forward(self._seed, start, self.device)
        before = self._generators()
        result = work(to_device(copied(batch), self.device))  # a loss may write to its inputs
        self.drew = self.drew or self._generators() != before
        self._beat()
        return result

    def _note_narrow(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
                self.narrow = True

    def _generators(self) -> Any:
        accelerator = generator_of(self.device)
        return generators_state(), bytes(accelerator.get_state().numpy()) if accelerator else b""


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute in IEEE fp32, without TF32 or bf16 in its place: their rounding would hide a dependence on the cut.

    torch has two interfaces for this. The older one can't be read once a task has used the newer one; it is then left
    unchanged.
    """
    cuda, cpu = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    backends: list[Any] = [torch.backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    before, benchmark = [backend.fp32_precision for backend in backends], cuda.benchmark
    older: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (get_cudnn_tf32, set_cudnn_tf32, False),
    ]
    with ExitStack() as stack:
        for backend, precision in zip(backends, before, strict=True):
            stack.callback(setattr, backend, "fp32_precision", precision)
        for get, put, exact in older:
            with suppress(RuntimeError):
                stack.callback(put, get())
                put(exact)
        stack.callback(setattr, cuda, "benchmark", benchmark)
        cuda.benchmark = False
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
