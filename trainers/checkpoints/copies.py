"""Copy the state to be saved to the CPU while training waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from isobatch.trainers.tensors.slices import Slice


class Copies:
    """Hold copies of a rank's slices until they are written, while training changes the originals.

    The memory is reused from save to save, since a copy into fresh memory takes ten times as long.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, slices: Iterable[Slice]) -> tuple[list[Slice], Callable[[], None]]:
        """Copy slices to the CPU, into the memory of the previous copies.

        ``slices`` is always iterated to its end, even after a failure, since it may contain collectives.

        Returns:
            The copies, and a function that waits until they are complete.

        Raises:
            MemoryError: there isn't enough memory for the copies.
        """
        kept, self._kept = self._kept, {}
        copies, accelerated, failed = [], False, ""
        for piece in slices:
            accelerated |= not piece.data.is_cpu
            try:
                if not failed:
                    data = self._kept[piece.name] = _copy(piece.data.detach(), kept.pop(piece.name, None))
                    copies.append(piece._replace(data=data))
            except (MemoryError, RuntimeError) as error:
                failed = f"{error!s:.200}"
                copies, kept, self._kept = [], {}, {}
        if failed:
            raise MemoryError(f"no memory for a copy of the state: {failed}")
        if accelerated:
            return copies, torch.accelerator.current_stream().record_event().synchronize
        return copies, lambda: None


def _copy(live: Tensor, kept: Tensor | None) -> Tensor:
    """Copy ``live`` into the memory of ``kept`` if that fits. A copy from an accelerator is asynchronous."""
    if kept is None or (kept.shape, kept.dtype) != (live.shape, live.dtype):
        kept = _memory_for(live)
    return kept.copy_(live, non_blocking=True)


def _memory_for(live: Tensor) -> Tensor:
    if not live.is_cpu:
        with suppress(RuntimeError):  # pinned memory is limited
            return torch.empty(live.shape, dtype=live.dtype, pin_memory=True)
    return torch.empty(live.shape, dtype=live.dtype)
