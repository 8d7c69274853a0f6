"""Try a task's contract on a few samples before step 1: its loss is a sum, and nothing in it counts calls.

A loss of n samples that isn't the sum over their halves changes with the cut, and a mean is wrong by a factor. Both
are found here, in some forwards of the bare model in fp32, of which nothing remains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook

from scaling.geometry import Cut, counted
from trainers.engines.root import checked
from trainers.keyed import FORWARD, generators_kept, generators_state, key_generators
from trainers.loader import to_device
from trainers.tasks import Task
from trainers.tasks.additivity import Draw, Verdict, judge
from trainers.tasks.halves import Halves
from trainers.tasks.untouched import Attributes, Copies, moved

DRAWS = 4  # batches; a single one can be balanced by luck
GRANULES = 16  # at most, of a batch


@dataclass(frozen=True, slots=True)
class Found:
    """What a trial found.

    Attributes:
        rejected: why the task can't be trained; empty where it can.
        counters: what counts calls, and so depends on the number of ranks, too.
        depends: what else makes the run depend on its cut.
        skipped: why something couldn't be tried.
    """

    rejected: str = ""
    counters: list[str] = field(default_factory=list)
    depends: list[str] = field(default_factory=list)
    skipped: str = ""


def batches_of(cut: Cut, train_samples: int) -> list[tuple[int, int, int]]:
    """Return start, middle and stop of the batches to try: whole granules, half of a micro-batch at most.

    Together they take as many samples through a backward as a few steps do. None where there is one granule alone.
    """
    most = min(cut.per_gpu, train_samples) // cut.granule
    granules = max(min(GRANULES, most // 2), min(2, most))
    if granules < 2:
        return []
    samples, half = granules * cut.granule, granules // 2 * cut.granule
    return [(start, start + half, start + samples) for start in range(0, DRAWS * samples, samples)]


class LossTrial:
    """Calls ``task.loss`` on whole batches and on their halves, with what couples samples by design switched off.

    Args:
        to_training_mode: puts the model into the modes in which it is trained.
        seed: of the run, by which what the forward draws is keyed.
        beat: called after every forward.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        to_training_mode: Callable[[], Any],
        device: torch.device,
        seed: int,
        beat: Callable[[], None],
    ) -> None:
        self._task, self._model, self._to_training_mode = task, model, to_training_mode
        self._device, self._seed, self._beat = device, seed, beat
        self._drew = self._narrow = False

    def run(self, batches: Sequence[Halves]) -> Found:
        """Return what the loss of ``batches`` tells.

        Raises:
            Refused: the loss returns something else than the contract says.
            Exception: the loss of a whole batch fails.
        """
        with self._untouched():
            counters = [
                f"{name} changes with every call of the forward or the loss, and the cut says how many calls a step has"
                for name in self._counters(batches[0])
            ]
            comparable = [batch for batch in batches if not batch.unkeyed]
            try:
                draws = self._draws(comparable)
                if self._drew:  # as functional dropout does in training mode; without that, everything can be compared
                    draws = self._in_eval_mode(comparable) or draws
            except _HalfFails as failure:
                return Found("", counters, [str(failure)])
        return _said(*judge(draws, noisy=self._drew or self._narrow), counters)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        self._attributes = Attributes(self._task, self._model)
        modules = [one for one in getattr(self._task, "__dict__", {}).values() if isinstance(one, nn.Module)]
        with ExitStack() as stack:
            stack.enter_context(generators_kept(self._device))
            stack.callback(self._attributes.restore)
            self._copies = [stack.enter_context(Copies(self._model, self._device))]
            self._copies += [stack.enter_context(Copies(module)) for module in modules if module is not self._model]
            stack.enter_context(exact_fp32())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # training gives those that matter
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            hook = register_module_forward_hook(self._note_narrow)
            stack.callback(hook.remove)
            self._to_training_mode()
            switch_off(self._model)
            yield

    def _note_narrow(self, module: nn.Module, args: Any, output: Any) -> None:
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dtype.itemsize < 4:
                self._narrow = True

    def _counters(self, batch: Halves) -> list[str]:
        """Return the names of the numbers that the second of two calls moves; the first may fill caches."""
        names = {str(index): name for index, (name, _) in enumerate(self._model.named_modules())}
        states = []
        with torch.no_grad():
            for _ in range(2):
                self._key(batch.start)
                self._task.loss(self._model, to_device(batch.whole, self._device))
                states.append((self._attributes.numbers(), self._copies[0].buffers()))
                self._beat()
        (numbers, buffers), (numbers_then, buffers_then) = states
        moved_buffers = [place.split(".", 1) for place in moved(buffers, buffers_then)]
        return moved(numbers, numbers_then) + [".".join(filter(None, ("model", names[i], n))) for i, n in moved_buffers]

    def _draws(self, batches: Sequence[Halves]) -> list[Draw]:
        return [self._draw(batch) for batch in batches]

    def _in_eval_mode(self, batches: Sequence[Halves]) -> list[Draw] | None:
        """The same in eval mode; None where the model doesn't work in that, or draws random numbers all the same."""
        self._drew = False
        self._model.eval()
        try:
            draws = self._draws(batches)
        except Exception:
            draws = None
        self._drew = self._drew or draws is None
        return None if self._drew else draws

    def _draw(self, batch: Halves) -> Draw:
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        samples = (batch.stop - batch.start, batch.middle - batch.start, batch.stop - batch.middle)
        whole, gradient = self._measure(batch.whole, batch.start, samples[0], parameters)
        try:
            first, of_first = self._measure(batch.first, batch.start, samples[1], parameters)
            second, of_second = self._measure(batch.second, batch.middle, samples[2], parameters)
        except Exception as error:
            raise _HalfFails(
                f"task.loss works for {counted(samples[0], 'sample')} and fails for {samples[1]} or {samples[2]} of "
                f"them ({type(error).__name__}: {error})"
            ) from error
        size = _norm(of_first) + _norm(of_second)
        if gradient:
            torch._foreach_sub_(gradient, of_first)
            torch._foreach_sub_(gradient, of_second)
        return Draw(whole, first, second, samples, _norm(gradient) / size if size else 0.0)

    def _measure(
        self, batch: Any, start: int, samples: int, parameters: list[nn.Parameter]
    ) -> tuple[tuple[float, float], list[Tensor]]:
        """The loss with its units, and the gradient, zeros where a parameter has none."""
        self._reset()
        key = self._key(start)
        loss, units = checked(self._task.loss(self._model, to_device(batch, self._device)), samples)
        self._drew = self._drew or self._key_moved(key)
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, gradient, strict=True)]
        self._narrow = self._narrow or any(one.dtype.itemsize < 4 for one in dense)
        self._beat()
        return (float(loss.detach()), float(units)), dense

    def _reset(self) -> None:
        """Let a call find what the first one found."""
        self._attributes.restore()
        for copies in self._copies:
            copies.reset_buffers()
        switch_off(self._model)

    def _key(self, start: int) -> Any:
        key = key_generators(self._seed, start, FORWARD)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(key)
        return self._generators()

    def _key_moved(self, before: Any) -> bool:
        return bool(self._generators() != before)

    def _generators(self) -> Any:
        accelerator = self._device.type == "cuda" and torch.cuda.default_generators[self._device.index or 0].get_state()
        return generators_state(), bytes(accelerator.numpy()) if isinstance(accelerator, Tensor) else b""


def _said(verdict: Verdict, draw: Draw | None, counters: list[str]) -> Found:
    if verdict == "mean":
        return Found(
            f"task.loss returns a mean, not a sum: {draw}; return (sum, number of units), with reduction='sum', or one "
            "loss per sample, with reduction='none'"
        )
    depends = [
        f"task.loss isn't a sum over samples: {draw}; negatives or statistics taken from the batch, the hardest of its "
        "samples, or a penalty added once per call do that"
    ]
    return Found("", counters, depends if verdict == "coupled" else [])


class _HalfFails(Exception):
    """The loss works for a whole batch and not for half of it."""


def switch_off(model: nn.Module) -> None:
    """Switch off what makes the loss of a sample random or couples samples by design, and is reported as such.

    That is dropout, and normalisation by statistics of the batch.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            if module.running_mean is None:  # else it takes statistics of the batch in eval mode, too
                like = next(model.parameters())
                module.running_mean = like.new_zeros(module.num_features)
                module.running_var = like.new_ones(module.num_features)
        elif isinstance(module, _DropoutNd) or "drop" in type(module).__name__.lower():
            module.eval()
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute in fp32 without the shortcuts of GPUs, whose rounding would hide what is looked for."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def _norm(tensors: Sequence[Tensor]) -> float:
    if not tensors:
        return 0.0
    return float(
        torch.stack([torch.linalg.vector_norm(one, dtype=torch.float64) for one in map(_real, tensors)]).norm()
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
