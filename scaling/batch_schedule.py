"""Batch schedules: parse ``batch.schedule`` and convert it to the segments of a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Schedule, Segment, samples_after
from isobatch.scaling.units import Duration

FORMS = (
    '"0sa:256 200000sa:512" (start:size), "ramp from:32 over:30%" (with by:32 to:512, if not the defaults), '
    '"curriculum" (doublings, from:32 to:512), "doubling" or "seesaw" (instead of decaying the LR; limit: to:4096); '
    "lr:hold keeps the LR of stages, ramps and curricula"
)
RAMP, CURRICULUM = ("from", "over", "to", "by", "lr"), ("from", "to", "lr")
OPTIONS = {"ramp": RAMP, "curriculum": CURRICULUM, "doubling": ("to",), "seesaw": ("to",)}
SEGMENTS = 10_000  # most segments of a schedule; more is a mistake
OF_THE_DATA = 10  # a batch above a tenth of the data loses the benefit of gradient noise (Smith et al. 2018)


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Hold a batch schedule as the user wrote it, with sizes in ``batch.unit``.

    >>> BatchSchedule.parse("0sa:256 200000sa:512").stages[1]
    (Duration(value=200000.0, unit='sa'), 512)

    Attributes:
        text: the schedule's text.
        kind: ``stages``, or a name of OPTIONS.
        stages: (start, size) of each stage, for the kind ``stages``.
        first, last, by: sizes, if given; ``over`` is the length of a ramp.
        hold: keep the LR of the first size.
    """

    text: str
    kind: str
    stages: tuple[tuple[Duration, int], ...] = ()
    first: int | None = None
    last: int | None = None
    by: int | None = None
    over: Duration | None = None
    hold: bool = False

    @classmethod
    def parse(cls, text: object) -> BatchSchedule:
        """Parse a schedule in one of FORMS.

        Raises:
            UserError: ``text`` has none of these forms; the message lists them.
        """
        words, problem = text.split() if isinstance(text, str) else [], f"{text!r} is not a batch schedule"
        if not words:
            raise UserError(problem, f"write {FORMS}", "batch.schedule", text)
        try:
            return cls._named(str(text), words) if words[0] in OPTIONS else cls._of_stages(str(text), words)
        except UserError as error:
            raise UserError(f"{problem}: {error}", f"write {FORMS}", "batch.schedule", text) from None

    @classmethod
    def _of_stages(cls, text: str, words: list[str]) -> BatchSchedule:
        options = _options("stages", [word for word in words if word.startswith("lr:")], ("lr",))
        stages = []
        for word in (word for word in words if not word.startswith("lr:")):
            when, colon, size = word.rpartition(":")
            if not colon:
                raise UserError(f"{word} isn't start:size")
            stages.append((_duration(when), _size(word, size)))
        if not stages or stages[0][0].value != 0:
            raise UserError("the first stage has to start at 0sa")
        return cls(text, "stages", tuple(stages), hold=_hold(options))

    @classmethod
    def _named(cls, text: str, words: list[str]) -> BatchSchedule:
        kind, *rest = words
        options = _options(kind, rest, OPTIONS[kind])
        given = {name: size for name, size in options.items() if name in ("from", "to", "by")}
        sizes = {name: _size(f"{name}:{size}", size) for name, size in given.items()}
        over = _duration(options["over"]) if "over" in options else None
        if kind == "ramp" and ("from" not in sizes or over is None):
            raise UserError("a ramp needs from:… and over:…")
        if kind == "curriculum":
            sizes = {"from": 32, "to": 512, **sizes}
        first, last = sizes.get("from"), sizes.get("to")
        if first is not None and last is not None and first > last:
            raise UserError(f"from:{first} is above to:{last}")
        return cls(text, kind, (), first, last, sizes.get("by"), over, _hold(options))

    def __str__(self) -> str:
        return self.text

    @property
    def depends_on_duration(self) -> bool:
        """Return True if the stages depend on the length of the run."""
        lengths = [when for when, _ in self.stages] + ([self.over] if self.over else [])
        return self.kind not in ("stages", "ramp") or any(length.unit == "%" for length in lengths)

    @property
    def for_decay(self) -> bool:
        """Return True if larger batches replace the decay of the LR."""
        return self.kind in ("doubling", "seesaw")

    @property
    def start(self) -> int | None:
        """Return the first size; None: the global batch of the run."""
        return self.stages[0][1] if self.stages else self.first


def segments_for(
    wanted: BatchSchedule,
    first: Segment,
    *,
    last: int | None,
    batch: Callable[[int], int],
    in_samples: Callable[[Duration], int | None],
    run_samples: int | None,
) -> tuple[Segment, ...] | None:
    """Return the segments of ``wanted`` in a run that starts with ``first``, or None if they aren't known yet.

    Args:
        last: the run's global batch in samples, at which a ramp without ``to`` ends.
        batch: converts a size of ``wanted`` to samples.
        in_samples: converts a length in any unit but steps to samples; returns None if that isn't known yet.

    Raises:
        UserError: stages aren't in order or start after the run ends, a size isn't a whole number of samples, or the
            batch never changes.
    """
    assert not wanted.for_decay
    rule = replace(Rule("none"), fixed=first.rule.later.fixed) if wanted.hold else first.rule.later
    starts = list(_starts(wanted, first, last, in_samples, batch, run_samples))
    if None in [start for start, _ in starts]:
        return None
    if len(starts) > SEGMENTS:
        raise _rejection(wanted, f" makes more than {SEGMENTS:,} steps of the batch", "use a larger by:…")
    segments = (first, *(Segment(start or 0, size, rule) for start, size in starts[1:]))
    begins = [segment.start_sample for segment in segments]
    if begins != sorted(set(begins)):
        raise _rejection(wanted, f": its stages start at {begins}", "each has to start after the previous one")
    if run_samples is not None and begins[-1] >= run_samples:
        problem = f": its last stage starts at sample {begins[-1]:,}, but the run has only {run_samples:,}"
        raise _rejection(wanted, problem, "start the stage earlier, or give a longer duration")
    return segments


def _starts(
    wanted: BatchSchedule,
    first: Segment,
    last: int | None,
    in_samples: Callable[[Duration], int | None],
    batch: Callable[[int], int],
    run_samples: int | None,
) -> Iterator[tuple[int | None, int]]:
    """Yield the first sample and the global batch of each segment."""
    size = first.global_size
    if wanted.kind == "stages":
        previous: list[tuple[int, int]] = []
        for when, stage_size in wanted.stages:
            in_steps = when.unit == "st" and previous
            start = samples_after(math.ceil(when.value), previous) if in_steps else in_samples(when)
            previous.append((start or 0, batch(stage_size)))
            yield start, previous[-1][1]
    elif wanted.kind == "ramp":
        assert wanted.over is not None
        over, top = in_samples(wanted.over), last if wanted.last is None else batch(wanted.last)
        by = batch(wanted.by) if wanted.by else size
        if top is None or top <= size:
            raise _rejection(wanted, f" goes from {size} to {top}", "give a larger to:…, or batch.global_size")
        climbs = -(-(top - size) // by)
        for climb in range(min(climbs, SEGMENTS) + 1):
            yield None if over is None else -(-over * climb // max(1, climbs)), min(top, size + climb * by)
    else:
        assert wanted.last is not None
        doublings = int(math.log2(batch(wanted.last) / size))
        if doublings == 0 or size << doublings != batch(wanted.last):
            begins = wanted.first or 0
            fix = f"give to:{begins << doublings} or to:{begins << doublings + 1}"
            raise _rejection(wanted, f": doubling {begins} never gives {wanted.last}", fix)
        for doubling in range(doublings + 1):
            start = None if run_samples is None else -(-run_samples * doubling // (doublings + 1))
            yield start, size << doubling


def in_place_of_decay(wanted: BatchSchedule, first: Segment, most: int, schedule: Schedule) -> tuple[Segment, ...]:
    """Return segments that multiply the batch by f whenever the LR would have decayed by f.

    f is 2, or 1/gamma for ``lr.decay=step``. ``doubling`` holds the LR (Smith et al. 2018, arXiv:1711.00489).
    ``seesaw`` divides it by √f (for Adam; Meterez et al. 2025, arXiv:2510.14717).

    Args:
        most: the largest batch, in samples.
        schedule: the LR's schedule, which the caller holds until the last of these segments starts.

    Raises:
        UserError: the batch can't grow even once.
    """
    factor = 1 / schedule.gamma if schedule.decay == "step" and schedule.gamma < 1 else 2.0
    rule = replace(Rule("power", -0.5) if wanted.kind == "seesaw" else Rule("none"), fixed=first.rule.later.fixed)
    if not first.global_size * factor <= most:
        limit = f"{most:,}, {'its to:…' if wanted.last else 'a tenth of the training data'}"
        problem = f": {counted(first.global_size, 'sample')} × {factor:g} is more than {limit}"
        raise _rejection(wanted, problem, "give a larger to:…, or a smaller batch.global_size")
    segments = [first]
    for growth in count(1):
        size, start = first.global_size * factor**growth, schedule.falls_to(factor**-growth * (1 + 1e-9))
        if size > most or start is None:
            break
        if start == segments[-1].start_sample > 0:
            segments.pop()
        segments.append(Segment(start, round(size), rule))
    if len(segments) == 1:
        falls = f"lr.decay={schedule.decay} with lr.final={schedule.final:g} never reaches 1/{factor:g} of the peak"
        problem = f" replaces the LR's decay by larger batches, but {falls}"
        raise _rejection(wanted, problem, "choose another lr.decay")
    return tuple(segments)


def _rejection(wanted: BatchSchedule, problem: str, fix: str) -> UserError:
    return UserError(f"batch.schedule={wanted}{problem}", fix, "batch.schedule", wanted)


def _options(kind: str, words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        name, colon, value = word.partition(":")
        if not colon or name not in known or name in options:
            raise UserError(f"{word} isn't valid: {kind} takes {', '.join(f'{k}:…' for k in known)}, each once")
        options[name] = value
    return options


def _hold(options: dict[str, str]) -> bool:
    wanted = options.get("lr", "rule")
    if wanted not in ("rule", "hold"):
        raise UserError(f"lr:{wanted} isn't valid: lr:rule scales the LR by lr.rule, lr:hold keeps it")
    return wanted == "hold"


def _duration(text: str) -> Duration:
    duration = Duration.parse(text)
    if duration.unit == "min":
        raise UserError(f"{text} is in minutes; use sa, ep, st, tok or %")
    return duration


def _size(word: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"{word} has no valid size, a whole number of 1 or more")
    return int(text)
