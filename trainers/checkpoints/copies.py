"""Copies on the CPU of what is saved, made while the training waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from isobatch.trainers.tensors.slices import Slice


class Copies:
    """Hold the memory in which a rank's slices wait to be written while the training changes the originals.

    The memory is kept from one save to the next: into fresh memory a copy takes ten times as long.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, slices: Iterable[Slice]) -> tuple[list[Slice], Callable[[], None]]:
        """Copy slices to the CPU, into the memory of the previous copies.

        ``slices`` is walked to its end in any case, since ranks may talk to each other in it.

        Returns:
            The copies, and a function that waits until they are complete.

        Raises:
            MemoryError: there isn't enough memory for them.
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
            raise MemoryError(f"no memory to copy to: {failed}")
        if accelerated:
            return copies, torch.accelerator.current_stream().record_event().synchronize
        return copies, lambda: None


def _copy(live: Tensor, kept: Tensor | None) -> Tensor:
    """Copy ``live`` into the memory of ``kept`` if it fits; from an accelerator the copy may still be on its way."""
    if kept is None or (kept.shape, kept.dtype) != (live.shape, live.dtype):
        kept = _memory_for(live)
    return kept.copy_(live, non_blocking=True)


def _memory_for(live: Tensor) -> Tensor:
    if not live.is_cpu:
        with suppress(RuntimeError):  # there is only so much that can be pinned
            return torch.empty(live.shape, dtype=live.dtype, pin_memory=True)
    return torch.empty(live.shape, dtype=live.dtype)
