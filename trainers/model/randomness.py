"""Randomness that follows the sample, not the rank: the same masks however a global batch is cut.

A mask is a function of (seed, the sample's position in the run, layer, call). Other random numbers of a forward come
from the default generators, which are keyed by micro-batch: reproducible, but not the same on another cut.
Random numbers that a dataset draws while it fetches one sample are keyed by that sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1

# The use of random numbers: part of every key.
AUGMENT, FORWARD, MASK, SAMPLE, SAMPLES, COLLATE, EVALUATION = range(1, 8)


def mix(*words: int) -> int:
    """Return a 64-bit hash of integers (splitmix64's finaliser, chained)."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _MASK64)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def generator_for(seed: int, position: int) -> torch.Generator:
    """Return the generator that ``augment`` gets for the sample at ``position`` of the run."""
    return torch.Generator().manual_seed(mix(seed, position, AUGMENT) >> 1)


def key_generators(seed: int, position: int, use: int) -> int:
    """Key Python's, numpy's and torch's default generators by a position of the run, and return the key.

    Args:
        use: one of FORWARD, SAMPLE, …, so that different uses at one position draw different numbers.
    """
    key = mix(seed, position, use) >> 1
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)
    return key


def generator_of(device: torch.device | None) -> torch.Generator | None:
    """Return the default generator of an accelerator; None for the CPU."""
    if device is None or device.type != "cuda":
        return None
    torch.cuda.init()  # before it, there are no generators
    return torch.cuda.default_generators[device.index or 0]


def key_forward(seed: int, position: int, device: torch.device) -> int:
    """Key the default generators, also that of ``device``, for the forward at ``position``, and return the key."""
    key = key_generators(seed, position, FORWARD)
    if accelerator := generator_of(device):
        accelerator.manual_seed(key)
    return key


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the default generators of Python, numpy, torch and an accelerator ``device`` afterwards."""
    accelerator = generator_of(device)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator_state = accelerator.get_state() if accelerator else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if accelerator and accelerator_state is not None:
            accelerator.set_state(accelerator_state)


def seed_generators(seed: int) -> None:
    """Seed all default generators for the draws before the first step, such as the task's and the initial weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators_state(
    torchs: torch.Generator = torch.default_generator,
    pythons: random.Random = random._inst,  # type: ignore[attr-defined]
    numpys: np.random.RandomState = np.random.mtrand._rand,
) -> tuple[bytes, Any, bytes]:
    """Return the states of torch's, Python's and numpy's generators; by default of the default generators."""
    _, words, place, *_ = numpys.get_state(legacy=True)
    return bytes(torchs.get_state().numpy()), pythons.getstate(), np.asarray(words).tobytes() + str(place).encode()


def evaluation_seed(seed: int) -> int:
    """Return the seed of all random numbers in evaluations, which differ from those of training."""
    return mix(seed, EVALUATION) >> 1


class _Use:
    """The use of a stream, training or evaluation; ``tell`` is called once with each reason."""

    def __init__(self, seed: int, tell: Callable[[str], None]) -> None:
        self.seed, self.tell_once, self.forwards = seed, cache(tell), 0


class Stream:
    """The samples of the current forward; shared by all keyed layers of a model (dropout.py).

    Args:
        tell: called once with each reason why the run depends on its cut, when it is first seen.
        tell_of_evaluation: called once with each reason why evaluations depend on their cut; None uses ``tell``.

    Attributes:
        samples: number of samples of the current forward.
        clock: int64, increased by each draw of compiled code: see dropout.py.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        tell: Callable[[str], None] = print,
        tell_of_evaluation: Callable[[str], None] | None = None,
    ) -> None:
        self._training = _Use(seed, tell)
        self._evaluation = _Use(evaluation_seed(seed), tell_of_evaluation or tell)
        self._use = self._training
        self.positions: Sequence[int] = range(0)
        self.samples = 0
        self.draws = 0  # from torch's generator, by keyed layers, in this forward
        self.clock = torch.zeros((), dtype=torch.int64)
        self.names: dict[int, str] = {}  # layer → name
        self.number = next(_NUMBERS)
        STREAMS[self.number] = self
        self._calls: dict[int, dict[int, int]] = {}
        self._key = 0
        self.device = device
        self._accelerator = generator_of(device)

    def __deepcopy__(self, memo: dict[int, object]) -> Stream:
        return self

    def start(self, start: int, stop: int) -> None:
        """Begin the forward of the samples at positions [start, stop) of the run."""
        self._begin(start, range(start, stop))

    @contextmanager
    def evaluating(self, rows: Sequence[int]) -> Iterator[None]:
        """Key the draws of one evaluation forward by its ``rows`` of the validation data, at least one.

        Training isn't affected: ``start`` keys its forwards.
        """
        self._use = self._evaluation
        try:
            self._begin(rows[0], rows)
            yield
            self.stop()
        finally:
            self._use = self._training

    def _begin(self, first: int, positions: Sequence[int]) -> None:
        self.positions, self.samples, self.draws = positions, len(positions), 0
        self._calls.clear()
        self._key = key_forward(self._use.seed, first, self.device)

    def stop(self) -> None:
        """End the forward. Sometimes check whether anything but keyed layers drew random numbers, and report it."""
        self._use.forwards = forwards = self._use.forwards + 1
        if forwards & (forwards - 1):  # the check costs as much as a small layer: run it at the 1st, 2nd, 4th, 8th, …
            return
        untouched = torch.Generator().manual_seed(self._key)
        for _ in range(self.draws):
            draw(untouched)
        expected = generators_state(untouched, random.Random(self._key), np.random.RandomState(self._key & 0xFFFFFFFF))
        drawn = generators_state() != expected
        if self._accelerator and not drawn:
            still = torch.Generator(self.device).manual_seed(self._key)
            drawn = not torch.equal(self._accelerator.get_state(), still.get_state())
        if drawn:
            self.tell("the forward draws random numbers outside of nn.Dropout modules")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tell(self, reason: str) -> None:
        """Report once why the run, or the evaluation that runs now, isn't the same on another cut."""
        self._use.tell_once(reason)

    def tell_of_evaluation(self, reason: str) -> None:
        """Report once why the values of evaluations aren't the same on another cut."""
        self._evaluation.tell_once(reason)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keys(self, layer: int) -> Tensor:
        """Return two 32-bit keys per sample for the next call of a layer: int32 [2, samples, 1].

        A second call in one forward needs another mask, but a recomputed activation needs the same mask. A draw from
        torch's generator tells them apart: checkpointing restores the generator before it recomputes.
        """
        self.draws += 1
        calls = self._calls.setdefault(layer, {})
        call = calls.setdefault(draw(torch.default_generator), len(calls))
        salt = mix(self._use.seed, layer, call, MASK)
        words = _finalise64(_int64(self.positions) * -7046029254386353131 + (salt - (1 << 63)))
        return torch.stack((words, words >> 32)).to(torch.int32).unsqueeze(-1).to(self.device, non_blocking=True)


STREAMS: WeakValueDictionary[int, Stream] = WeakValueDictionary()
"""Streams by their number: a custom operator can't take objects."""
_NUMBERS = count()  # numbers are never reused


def _int64(positions: Sequence[int]) -> Tensor:
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, positions.step, dtype=torch.int64)
    return torch.tensor(positions, dtype=torch.int64)


def _finalise64(words: Tensor) -> Tensor:
    """Apply splitmix64's finaliser to int64; masks turn the arithmetic ``>>`` into a logical shift."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def draw(generator: torch.Generator) -> int:
    """Return a random integer drawn on the CPU, without waiting for a device."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))
